//! Instructions under test: each that the engine translates and user mode may execute, in each of its encodings, with
//! registers, flags and memory that make it do something.

use super::native::{GS_BASE, PAGE, State, WRITABLE_PAGES};
use super::operands::{self, Registers};
use super::random::Random;
use crate::alu::ARITHMETIC;
use crate::cpu::{DF, FIXED, IF, RAX, RBP, RCX, RDI, RDX, RSI, RSP};
use iced_x86::{
    Code, ConditionCode, Encoder, EncodingKind, Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register,
};

/// The flag that says that there is CPUID; a program may change it.
const ID: u64 = 1 << 21;
/// Bytes of the code that ends a run; see `native`.
const LANDING_BYTES: u64 = 16;

/// An instruction with everything it finds.
pub(super) struct Case {
    pub(super) insn: Instruction,
    pub(super) bytes: Vec<u8>,
    pub(super) at: u64,
    /// NOPs in front of it, where a run begins.
    pub(super) lead: u64,
    pub(super) state: State,
    /// Bytes to be put into memory before it is done.
    pub(super) pokes: Vec<(u64, Vec<u8>)>,
    /// Where it may go: on, up, down.
    pub(super) landings: [u64; 3],
    /// The bit that a bit instruction's register is to have, counted from its operand.
    bit: i64,
}

/// Makes cases for code and data at given addresses.
pub(super) struct Cases {
    pub(super) random: Random,
    codes: Vec<Vec<Code>>,
    code: u64,
    data: u64,
}

/// All encodings, by mnemonic.
fn encodings() -> Vec<Vec<Code>> {
    let mut by_mnemonic: Vec<(Mnemonic, Vec<Code>)> = Vec::new();
    for code in Code::values().filter(|&code| is_meant(code)) {
        match by_mnemonic.iter_mut().find(|(mnemonic, _)| *mnemonic == code.mnemonic()) {
            Some((_, codes)) => codes.push(code),
            None => by_mnemonic.push((code.mnemonic(), vec![code])),
        }
    }
    by_mnemonic.into_iter().map(|(_, codes)| codes).collect()
}

fn is_meant(code: Code) -> bool {
    let op_code = code.op_code();
    let legacy =
        op_code.encoding() == EncodingKind::Legacy && op_code.mode64() && op_code.address_size() != 32;
    let condition = code.condition_code() != ConditionCode::None;
    legacy
        && (condition || is_listed(code.mnemonic()))
        && op_code.op_kinds().iter().all(|&kind| is_possible(kind))
        && !is_narrow_or_far(code)
        && !is_differently_done(code)
}

/// Encodings that processors differ in: undefined, or of 16 bits on one and 32 on another.
fn is_differently_done(code: Code) -> bool {
    matches!(code, Code::Bswap_r16 | Code::Movsxd_r16_rm16)
}

fn is_possible(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    let made = operands::register(&mut Random::new(1), kind).is_some()
        || operands::memory_kind(kind).is_some()
        || operands::immediate(&mut Instruction::default(), 0, kind, &mut Random::new(1));
    made || matches!(kind, K::br64_1 | K::br64_4 | K::seg_rSI | K::es_rDI)
}

/// Stack and branch instructions with operands of 16 bits, and far ones, which are left to KVM.
fn is_narrow_or_far(code: Code) -> bool {
    use Mnemonic as M;
    let mut insn = Instruction::default();
    insn.set_code(code);
    match code.mnemonic() {
        M::Push | M::Pop => insn.stack_pointer_increment().abs() != 8,
        M::Call => !matches!(code, Code::Call_rel32_64 | Code::Call_rm64),
        M::Jmp => !matches!(code, Code::Jmp_rel8_64 | Code::Jmp_rel32_64 | Code::Jmp_rm64),
        M::Ret => !matches!(code, Code::Retnq | Code::Retnq_imm16),
        M::Leave => code != Code::Leaveq,
        _ => false,
    }
}

#[rustfmt::skip]
fn is_listed(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor | M::Cmp | M::Test
            | M::Inc | M::Dec | M::Neg | M::Not | M::Mul | M::Imul | M::Div | M::Idiv
            | M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Movnti | M::Lea | M::Xchg | M::Cmpxchg | M::Xadd
            | M::Bswap | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shl | M::Shr | M::Sal | M::Sar | M::Shld | M::Shrd
            | M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo
            | M::Bt | M::Bts | M::Btr | M::Btc | M::Bsf | M::Bsr | M::Popcnt | M::Tzcnt | M::Lzcnt
            | M::Lahf | M::Sahf | M::Clc | M::Stc | M::Cmc | M::Cld | M::Std
            | M::Push | M::Pop | M::Pushfq | M::Popfq | M::Leave | M::Call | M::Ret | M::Jmp
            | M::Jrcxz | M::Loop
            | M::Movsb | M::Movsw | M::Movsd | M::Movsq | M::Stosb | M::Stosw | M::Stosd | M::Stosq
            | M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq
            | M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq
            | M::Nop | M::Pause | M::Endbr64 | M::Lfence | M::Mfence | M::Sfence
            | M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchw
    )
}

impl Cases {
    pub(super) fn new(seed: u64, code: u64, data: u64) -> Self {
        Self { random: Random::new(seed), codes: encodings(), code, data }
    }

    /// A random instruction. Some attempts lead to none: registers that cannot be together, an address out of reach.
    pub(super) fn next(&mut self) -> Case {
        loop {
            let of_one = self.random.below(self.codes.len() as u64) as usize;
            let code = self.random.pick(&self.codes[of_one]);
            if let Some(case) = self.case(code) {
                return case;
            }
        }
    }

    /// All encodings there are.
    pub(super) fn codes(&self) -> impl Iterator<Item = Code> {
        self.codes.iter().flatten().copied()
    }

    fn case(&mut self, code: Code) -> Option<Case> {
        let mut insn = Instruction::default();
        insn.set_code(code);
        let at = match self.random.below(8) {
            // Across the end of a page.
            0 => self.code + PAGE - self.random.below(16),
            _ => self.code + 64 + self.random.below(PAGE - 128),
        };
        let string_or_stack = code.op_code().op_kinds().iter().any(|kind| is_string(*kind));
        let down = self.random.once_in(if string_or_stack { 2 } else { 8 });
        let mut flags = self.random.next() & ARITHMETIC | FIXED | IF;
        flags |= if down { DF } else { 0 } | if self.random.once_in(8) { ID } else { 0 };
        let registers = Registers::new(&mut self.random);
        let state = State { registers: [0; 16], flags };
        let landings = [0, 0, at - 2 * LANDING_BYTES];
        let lead = if self.random.once_in(2) { 0 } else { self.random.below(LANDING_BYTES) };
        let mut case = Case { insn, bytes: Vec::new(), at, lead, state, pokes: Vec::new(), landings, bit: 0 };
        self.fill(&mut case, registers)?;
        Some(case)
    }

    fn fill(&mut self, case: &mut Case, mut registers: Registers) -> Option<()> {
        self.implied(case, &mut registers);
        for (number, kind) in (0..).zip(case.insn.op_code().op_kinds()) {
            self.operand(case, number, *kind, &mut registers)?;
        }
        self.agree(case, &mut registers)?;
        case.state.registers = registers.values;
        // A branch is measured first: where its target lies depends on its length.
        let branches =
            (0..case.insn.op_count()).any(|number| case.insn.op_kind(number) == OpKind::NearBranch64);
        let up = self.random.once_in(2);
        if branches {
            case.insn.set_near_branch64(case.landings[2]);
        }
        let len = encode(&case.insn, case.at)?.len() as u64;
        case.landings[0] = case.at + len;
        case.landings[1] = case.at + len + LANDING_BYTES;
        if branches && up {
            case.insn.set_near_branch64(case.landings[1]);
        }
        case.bytes = encode(&case.insn, case.at)?;
        Some(())
    }

    /// Registers that the instruction uses without naming them.
    fn implied(&mut self, case: &mut Case, registers: &mut Registers) {
        use Mnemonic as M;
        let mnemonic = case.insn.mnemonic();
        if case.insn.is_stack_instruction() && !matches!(mnemonic, M::Leave) {
            let stack = self.stack(matches!(mnemonic, M::Popfq | M::Ret));
            registers.pin(RSP, stack);
        }
        match mnemonic {
            M::Leave => {
                let frame = self.stack(false);
                registers.pin(RBP, frame);
            }
            M::Popfq => {
                let popped = self.random.next() & (ARITHMETIC | DF | ID) | FIXED | IF;
                self.poke(case, registers.values[RSP as usize], &popped.to_le_bytes());
            }
            M::Ret => {
                let target = case.landings[2];
                self.poke(case, registers.values[RSP as usize], &target.to_le_bytes());
            }
            M::Jrcxz | M::Loop | M::Loope | M::Loopne if self.random.once_in(2) => {
                let count = self.random.below(3);
                registers.pin(RCX, count);
            }
            M::Div | M::Idiv if self.random.once_in(2) => {
                // A dividend that fits more divisors.
                let high = self.random.below(3).wrapping_sub(1);
                registers.pin(RDX, high);
            }
            M::Shld | M::Shrd => {
                let rest = registers.values[RCX as usize] & !0xff;
                registers.pin(RCX, rest | u64::from(self.double_shift_count()));
            }
            _ => {}
        }
        let string = case.insn.op_code().op_kinds().iter().any(|kind| is_string(*kind));
        if string {
            self.string(case, registers);
        }
    }

    fn string(&mut self, case: &mut Case, registers: &mut Registers) {
        let size = case.insn.op_code().memory_size().size() as u64;
        let compares = case.insn.rflags_modified() != 0;
        match self.random.below(4) {
            0 => {}
            1 if compares => case.insn.set_has_repne_prefix(true),
            _ => case.insn.set_has_rep_prefix(true),
        }
        let count = match self.random.below(8) {
            0 => 0,
            1 => self.random.below(2 * PAGE / size),
            2 => self.random.below(PAGE / size),
            _ => self.random.below(40),
        };
        if case.insn.has_rep_prefix() || case.insn.has_repne_prefix() {
            registers.pin(RCX, count);
        }
        let to = self.string_target(count * size, case.state.flags & DF != 0);
        let from = match self.random.below(4) {
            // Near enough to overlap.
            0 => to.wrapping_add(self.random.below(64)).wrapping_sub(32),
            1 => to.wrapping_sub(size),
            _ => self.string_target(count * size, case.state.flags & DF != 0),
        };
        let gs = self.random.once_in(6);
        let has_source = case.insn.op_code().op_kinds().contains(&OpCodeOperandKind::seg_rSI);
        if gs && has_source {
            case.insn.set_segment_prefix(Register::GS);
        }
        registers.pin(RDI, to);
        registers.pin(RSI, if gs && has_source { from.wrapping_sub(GS_BASE) } else { from });
        if compares {
            // Something that is equal for a while.
            let accumulator = registers.values[RAX as usize].to_le_bytes();
            let run: Vec<u8> = accumulator[..size as usize].iter().copied().cycle().take(64).collect();
            self.poke(case, to, &run);
            if has_source && self.random.once_in(2) {
                self.poke(case, from, &run);
            }
        }
    }

    /// Where a string instruction begins: mostly so that all of it is in the data.
    fn string_target(&mut self, bytes: u64, down: bool) -> u64 {
        let room = (WRITABLE_PAGES * PAGE).saturating_sub(bytes).max(1);
        let begin = match self.random.below(16) {
            0 => self.near_an_edge(),
            _ => self.data + self.random.below(room),
        };
        if down { (begin + bytes).wrapping_sub(8) } else { begin }
    }

    fn operand(
        &mut self,
        case: &mut Case,
        number: u32,
        kind: OpCodeOperandKind,
        registers: &mut Registers,
    ) -> Option<()> {
        use OpCodeOperandKind as K;
        let insn = &mut case.insn;
        match kind {
            K::br64_1 | K::br64_4 => insn.set_op_kind(number, OpKind::NearBranch64),
            K::seg_rSI => insn.set_op_kind(number, OpKind::MemorySegRSI),
            K::es_rDI => insn.set_op_kind(number, OpKind::MemoryESRDI),
            _ if operands::immediate(insn, number, kind, &mut self.random) => {}
            _ => match operands::memory_kind(kind) {
                Some(always) if always || self.random.once_in(2) => {
                    return self.memory(case, number, kind, registers);
                }
                _ => {
                    let mut register = operands::register(&mut self.random, kind)?;
                    let first = insn.op0_register();
                    if number == 1 && first.size() == register.size() && self.random.once_in(8) {
                        register = operands::same(first, kind).unwrap_or(register);
                    }
                    insn.set_op_kind(number, OpKind::Register);
                    insn.set_op_register(number, register);
                    if matches!(insn.mnemonic(), Mnemonic::Jmp | Mnemonic::Call) {
                        let own = register.number() as u8;
                        if own == RSP {
                            return None;
                        }
                        registers.pin(own, case.landings[2]);
                    }
                }
            },
        }
        Some(())
    }

    fn memory(
        &mut self,
        case: &mut Case,
        number: u32,
        kind: OpCodeOperandKind,
        registers: &mut Registers,
    ) -> Option<()> {
        let lock = case.insn.op_code().can_use_lock_prefix() && number == 0 && self.random.once_in(4);
        case.insn.set_has_lock_prefix(lock);
        let target = self.target(case, lock);
        let random = &mut self.random;
        if kind == OpCodeOperandKind::mem_offs {
            operands::far_address(&mut case.insn, number, target);
            return Some(());
        }
        let address = if is_address_only(&case.insn) {
            random.value()
        } else if is_bit_string(&case.insn) {
            let bits = 8 * case.insn.op_code().memory_size().size() as i64;
            case.bit = match bits {
                16 => i64::from(random.value() as i16),
                32 => i64::from(random.value() as i32),
                _ => random.value() as i64,
            };
            target.wrapping_sub((case.bit.div_euclid(bits) * bits / 8) as u64)
        } else {
            target
        };
        operands::memory(&mut case.insn, number, address, registers, random)
    }

    /// Where memory is accessed, with something in it.
    fn target(&mut self, case: &mut Case, lock: bool) -> u64 {
        let bytes = WRITABLE_PAGES * PAGE;
        let mut target = match self.random.below(16) {
            0 => self.near_an_edge(),
            1 => self.data + PAGE * (1 + self.random.below(WRITABLE_PAGES - 1)) - self.random.below(16),
            _ => self.data + self.random.below(bytes - 8),
        };
        if lock || case.insn.mnemonic() == Mnemonic::Xchg || self.random.once_in(2) {
            // Locked accesses across a cache line are a nuisance to all of the machine.
            target &= !7;
        }
        let mut value = self.random.value();
        if matches!(case.insn.mnemonic(), Mnemonic::Jmp | Mnemonic::Call) {
            target = self.data + self.random.below(bytes - 8);
            value = case.landings[2];
        }
        self.poke(case, target, &value.to_le_bytes());
        target
    }

    /// Values that belong together.
    fn agree(&mut self, case: &mut Case, registers: &mut Registers) -> Option<()> {
        let insn = &mut case.insn;
        let in_memory = insn.op0_kind() == OpKind::Memory;
        if insn.mnemonic() == Mnemonic::Cmpxchg && self.random.once_in(2) {
            let wanted = registers.values[RAX as usize];
            if in_memory {
                case.pokes.iter_mut().for_each(|(_, bytes)| *bytes = wanted.to_le_bytes().to_vec());
            } else {
                registers.pin(insn.op0_register().full_register().number() as u8, wanted);
            }
        } else if is_bit_string(insn) && in_memory {
            let register = insn.op1_register();
            let (number, kept) = (register.number() as u8, u64::MAX << (8 * register.size() as u32 - 1) << 1);
            if registers.is_pinned(number) {
                return None;
            }
            let value = registers.values[number as usize] & kept | case.bit as u64 & !kept;
            registers.pin(number, value);
        } else if matches!(insn.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
            && insn.op2_kind() == OpKind::Immediate8
        {
            let count = self.double_shift_count();
            insn.set_immediate8(count);
        }
        Some(())
    }

    /// One that no operand is too narrow for: beyond, the result is undefined.
    fn double_shift_count(&mut self) -> u8 {
        let narrow = self.random.below(17) as u8;
        // Masked away, but of 64 bits bit 5 is not.
        narrow | (0x20 * self.random.below(8) as u8)
    }

    /// A stack pointer; `popped` says that what is there is meant to be there, if it can be reached at all.
    fn stack(&mut self, popped: bool) -> u64 {
        let aligned = if self.random.once_in(4) { 0 } else { 7 };
        match self.random.below(16) {
            0 if popped => self.data - 1 - self.random.below(16),
            0 => self.near_an_edge(),
            _ => self.data + 64 + (self.random.below(WRITABLE_PAGES * PAGE - 256) & !aligned),
        }
    }

    /// Where an access may fault: below the data, at what can only be read, above that.
    fn near_an_edge(&mut self) -> u64 {
        let page = self.random.pick(&[0, WRITABLE_PAGES, WRITABLE_PAGES + 1]);
        self.data + page * PAGE + self.random.below(24) - 16
    }

    /// Bytes for memory, where it can be written.
    fn poke(&self, case: &mut Case, at: u64, bytes: &[u8]) {
        let end = self.data + WRITABLE_PAGES * PAGE;
        if at >= self.data && at + bytes.len() as u64 <= end {
            case.pokes.push((at, bytes.to_vec()));
        }
    }
}

fn encode(insn: &Instruction, at: u64) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(64);
    encoder.encode(insn, at).ok()?;
    Some(encoder.take_buffer())
}

fn is_string(kind: OpCodeOperandKind) -> bool {
    matches!(kind, OpCodeOperandKind::seg_rSI | OpCodeOperandKind::es_rDI)
}

/// A bit instruction whose register reaches beyond its operand.
fn is_bit_string(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(insn.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && operands::register(&mut Random::new(1), insn.op_code().op1_kind()).is_some()
}

/// An operand that is never loaded.
fn is_address_only(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Lea | M::Nop | M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchw
    )
}
