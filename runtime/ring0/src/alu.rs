//! Arithmetic: results and flags of the integer instructions, of any width (SDM vol. 1, 3.4.3, and vol. 2).
//!
//! Pure. Operands are zero-extended; a result is cut to its width. Flags that the manual leaves undefined are what
//! current processors make of them or, where those differ, unchanged.

/// Carry.
pub(crate) const CF: u64 = 1;
/// Parity of the lowest byte.
pub(crate) const PF: u64 = 1 << 2;
/// Carry out of bit 3.
pub(crate) const AF: u64 = 1 << 4;
/// Zero.
pub(crate) const ZF: u64 = 1 << 6;
/// Sign.
pub(crate) const SF: u64 = 1 << 7;
/// Overflow.
pub(crate) const OF: u64 = 1 << 11;
/// All of them.
pub(crate) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;

/// Bits that `bytes` bytes have.
#[inline]
pub(crate) fn mask(bytes: u8) -> u64 {
    u64::MAX >> (64 - 8 * u32::from(bytes))
}

/// The number of the highest bit.
#[inline]
pub(crate) fn top(bytes: u8) -> u32 {
    8 * u32::from(bytes) - 1
}

/// `value`, sign-extended from `bytes` bytes.
#[inline]
pub(crate) fn sign_extend(value: u64, bytes: u8) -> u64 {
    let unused = 63 - top(bytes);
    ((value << unused) as i64 >> unused) as u64
}

/// ZF, SF and PF of a result.
#[inline]
pub(crate) fn zsp(result: u64, bytes: u8) -> u64 {
    let parity = u64::from((result as u8).count_ones() & 1 == 0) << 2;
    let zero = u64::from(result & mask(bytes) == 0) << 6;
    let sign = ((result >> top(bytes)) & 1) << 7;
    parity | zero | sign
}

/// `a + b + carry`.
#[inline]
pub(crate) fn add(a: u64, b: u64, carry: u64, bytes: u8) -> (u64, u64) {
    let top = top(bytes);
    let result = a.wrapping_add(b).wrapping_add(carry) & mask(bytes);
    let out = (((a & b) | ((a | b) & !result)) >> top) & 1;
    let overflow = (((a ^ result) & (b ^ result)) >> top) & 1;
    (result, out | (overflow << 11) | ((a ^ b ^ result) & AF) | zsp(result, bytes))
}

/// `a - b - borrow`.
#[inline]
pub(crate) fn sub(a: u64, b: u64, borrow: u64, bytes: u8) -> (u64, u64) {
    let top = top(bytes);
    let result = a.wrapping_sub(b).wrapping_sub(borrow) & mask(bytes);
    let out = (((!a & b) | ((!a | b) & result)) >> top) & 1;
    let overflow = (((a ^ b) & (a ^ result)) >> top) & 1;
    (result, out | (overflow << 11) | ((a ^ b ^ result) & AF) | zsp(result, bytes))
}

/// The flags of AND, OR, XOR and TEST.
#[inline]
pub(crate) fn logic(result: u64, bytes: u8) -> u64 {
    zsp(result, bytes)
}

/// A shift or rotation, of `/r` 0 to 7 in the opcode's group 2: ROL, ROR, RCL, RCR, SHL, SHR, SHL, SAR. `flags` are those
/// before, and come back changed as they must be.
pub(crate) fn shift(kind: u8, value: u64, count: u8, flags: u64, bytes: u8) -> (u64, u64) {
    let bits = top(bytes) + 1;
    let count = u32::from(count) & if bytes == 8 { 63 } else { 31 };
    if count == 0 {
        return (value, flags);
    }
    match kind {
        0 | 1 => rotate(kind == 0, value, count, flags, bytes),
        2 | 3 => rotate_carry(kind == 2, value, count, flags, bytes),
        4 | 6 => {
            let result = if count < bits { (value << count) & mask(bytes) } else { 0 };
            let carry = if count <= bits { (value >> (bits - count)) & 1 } else { 0 };
            let overflow = ((result >> top(bytes)) & 1) ^ carry;
            (result, shifted(flags, carry, overflow, result, bytes))
        }
        5 => {
            let result = if count < bits { value >> count } else { 0 };
            let carry = if count <= bits { (value >> (count - 1)) & 1 } else { 0 };
            // The sign changes only when it was set, and the first bit shifted in is 0.
            let overflow = ((result >> top(bytes)) ^ (result << 1 >> top(bytes))) & 1;
            (result, shifted(flags, carry, overflow, result, bytes))
        }
        _ => {
            let wide = sign_extend(value, bytes) as i64;
            let result = (wide >> count.min(63)) as u64 & mask(bytes);
            let carry = (wide >> (count - 1).min(63)) as u64 & 1;
            (result, shifted(flags, carry, 0, result, bytes))
        }
    }
}

fn shifted(flags: u64, carry: u64, overflow: u64, result: u64, bytes: u8) -> u64 {
    (flags & !ARITHMETIC) | carry | (overflow << 11) | zsp(result, bytes)
}

fn rotate(left: bool, value: u64, count: u32, flags: u64, bytes: u8) -> (u64, u64) {
    let bits = top(bytes) + 1;
    let by = count % bits;
    let by = if left { by } else { (bits - by) % bits };
    let result = if by == 0 { value } else { ((value << by) | (value >> (bits - by))) & mask(bytes) };
    let (low, high) = (result & 1, (result >> top(bytes)) & 1);
    let carry = if left { low } else { high };
    let overflow = if left { high ^ low } else { high ^ ((result >> (bits - 2)) & 1) };
    (result, (flags & !(CF | OF)) | carry | (overflow << 11))
}

fn rotate_carry(left: bool, value: u64, count: u32, flags: u64, bytes: u8) -> (u64, u64) {
    let bits = top(bytes) + 1;
    let count = count % (bits + 1);
    let mut wide = u128::from(value) | (u128::from(flags & CF) << bits);
    let all = (1_u128 << (bits + 1)) - 1;
    let by = if left { count } else { (bits + 1 - count) % (bits + 1) };
    if by != 0 {
        wide = ((wide << by) | (wide >> (bits + 1 - by))) & all;
    }
    let result = wide as u64 & mask(bytes);
    let carry = (wide >> bits) as u64 & 1;
    let high = (result >> top(bytes)) & 1;
    let overflow = if left { high ^ carry } else { high ^ ((result >> (bits - 2)) & 1) };
    (result, (flags & !(CF | OF)) | carry | (overflow << 11))
}

/// SHLD, or SHRD: `value` shifted, with bits of `from` moving in. A count beyond the width (16-bit operands) is
/// undefined; it is taken modulo the width.
pub(crate) fn double_shift(
    left: bool,
    value: u64,
    from: u64,
    count: u8,
    flags: u64,
    bytes: u8,
) -> (u64, u64) {
    let bits = top(bytes) + 1;
    let count = u32::from(count) & if bytes == 8 { 63 } else { 31 };
    let count = if count > bits { count % bits } else { count };
    if count == 0 {
        return (value, flags);
    }
    let (wide, carry) = if left {
        let both = (u128::from(value) << bits) | u128::from(from);
        (((both << count) >> bits) as u64, (value >> (bits - count)) & 1)
    } else {
        let both = (u128::from(from) << bits) | u128::from(value);
        ((both >> count) as u64, (value >> (count - 1)) & 1)
    };
    let result = wide & mask(bytes);
    let overflow = ((result ^ value) >> top(bytes)) & 1;
    (result, shifted(flags, carry, overflow, result, bytes))
}

/// The two halves of an unsigned product, low first, and whether the upper one counts.
pub(crate) fn multiply(a: u64, b: u64, bytes: u8) -> (u64, u64, bool) {
    let wide = u128::from(a) * u128::from(b);
    let high = (wide >> (8 * u32::from(bytes))) as u64 & mask(bytes);
    (wide as u64 & mask(bytes), high, high != 0)
}

/// The same of a signed product, and whether it does not fit the lower half.
pub(crate) fn multiply_signed(a: u64, b: u64, bytes: u8) -> (u64, u64, bool) {
    let signed = |value| i128::from(sign_extend(value, bytes) as i64);
    let wide = signed(a) * signed(b);
    let low = wide as u64 & mask(bytes);
    let high = (wide >> (8 * u32::from(bytes))) as u64 & mask(bytes);
    (low, high, i128::from(sign_extend(low, bytes) as i64) != wide)
}

/// Quotient and remainder of `high:low / by`, or `None` for a divide error.
pub(crate) fn divide(high: u64, low: u64, by: u64, bytes: u8) -> Option<(u64, u64)> {
    let value = (u128::from(high) << (8 * u32::from(bytes))) | u128::from(low);
    let quotient = value.checked_div(u128::from(by))?;
    let remainder = value % u128::from(by);
    (quotient <= u128::from(mask(bytes))).then_some((quotient as u64, remainder as u64))
}

/// The same of signed numbers.
pub(crate) fn divide_signed(high: u64, low: u64, by: u64, bytes: u8) -> Option<(u64, u64)> {
    let bits = 8 * u32::from(bytes);
    let unused = 128 - 2 * bits;
    let value = (((u128::from(high) << bits) | u128::from(low)) << unused) as i128 >> unused;
    let by = i128::from(sign_extend(by, bytes) as i64);
    let quotient = value.checked_div(by)?;
    let remainder = value.checked_rem(by)?;
    let fits = i128::from(sign_extend(quotient as u64, bytes) as i64) == quotient;
    fits.then(|| (quotient as u64 & mask(bytes), remainder as u64 & mask(bytes)))
}

/// Whether a condition holds, by its number in the opcode (SDM vol. 2, appendix B.1.4.7).
#[inline]
pub(crate) fn condition(code: u8, flags: u64) -> bool {
    let is = |flag: u64| flags & flag != 0;
    let holds = match code >> 1 {
        0 => is(OF),
        1 => is(CF),
        2 => is(ZF),
        3 => is(CF | ZF),
        4 => is(SF),
        5 => is(PF),
        6 => is(SF) != is(OF),
        _ => is(ZF) || is(SF) != is(OF),
    };
    holds != (code & 1 == 1)
}
