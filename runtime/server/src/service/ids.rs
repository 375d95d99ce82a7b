//! Names of sandboxes and snapshots.

use std::io;

/// Digits of randomness.
const RANDOM_DIGITS: usize = 16;

/// `run` and 4 digits of the node, so that a fleet routes without a look-up, and 16 of randomness: the id is
/// also the credential of the sandbox's anonymous ports.
///
/// # Errors
/// If the host's kernel gives no random bytes.
pub(crate) fn run_id(node: u16) -> io::Result<String> {
    Ok(format!("run{node:04x}{}", random_digits(RANDOM_DIGITS)?))
}

/// `snap` and likewise.
///
/// # Errors
/// As [`run_id`].
pub(crate) fn snapshot_id(node: u16) -> io::Result<String> {
    Ok(format!("snap{node:04x}{}", random_digits(RANDOM_DIGITS)?))
}

/// A number that nobody guesses, and that is not drawn twice.
///
/// # Errors
/// As [`run_id`].
pub(super) fn random_u64() -> io::Result<u64> {
    let mut bytes = [0_u8; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Hexadecimal digits from the host's kernel.
///
/// # Errors
/// As [`run_id`].
pub fn random_digits(count: usize) -> io::Result<String> {
    let mut bytes = vec![0_u8; count.div_ceil(2)];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    let mut digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    digits.truncate(count);
    Ok(digits)
}
