//! A sampling profiler of the guest: where its first vCPU is at fixed intervals, symbolised with the kernel's
//! `System.map` and written as folded stacks, the input of every flame graph tool.
//!
//! The guest kernel keeps neither frame pointers nor unwind tables, which would cost instructions on every
//! run. So a stack is scanned for return addresses, and a word counts as one only if a call instruction
//! stands before it that goes to the function of the frame below, directly, by one tail jump or through
//! functions that are a jump and no more (the trampolines of static calls), or is indirect. What is stale on a stack passes that seldom; a frame may be missing, and an indirect call's may
//! be wrong.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;

/// Most words of a stack that are looked at: the guest kernel's stacks are 16 KiB.
pub(crate) const MOST_WORDS: usize = 2048;
/// Where the kernel's text is linked (`__START_KERNEL_map`): physical address 0 without KASLR.
pub const TEXT_MAP: u64 = 0xffff_ffff_8000_0000;
/// The end of the kernel's text, far beyond any of ours.
const TEXT_END: u64 = TEXT_MAP + (1 << 30);
/// Stack words kept of a sample: deeper stacks lose their root.
const MOST_CANDIDATES: usize = 192;
/// Jumps that a call is followed through.
const MOST_TRAMPOLINES: usize = 4;
/// Longest function searched for tail jumps.
const MOST_FUNCTION_BYTES: u64 = 16 << 10;

/// Samples of one microVM: how often each place was seen.
#[derive(Debug, Default, Clone)]
pub struct Samples {
    counts: BTreeMap<Place, u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    kernel: bool,
    rip: u64,
    /// Words of the stack that may be return addresses, innermost first.
    words: Vec<u64>,
}

impl Samples {
    /// Adds one sample: the instruction pointer, and in the kernel the words of its stack from RSP up.
    pub fn add(&mut self, kernel: bool, rip: u64, stack: impl Iterator<Item = u64>) {
        let text = |word: &u64| (TEXT_MAP..TEXT_END).contains(word);
        let words = if kernel { stack.filter(text).take(MOST_CANDIDATES).collect() } else { Vec::new() };
        *self.counts.entry(Place { kernel, rip: if kernel { rip } else { 0 }, words }).or_default() += 1;
    }

    /// Number of samples.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    /// Folded stacks (`guest;kernel;outer;inner count`, one line each, most frequent first). `text` gives the
    /// bytes of the kernel's text at a linear address, fewer or none where there are none.
    #[must_use]
    pub fn folded(&self, symbols: &Symbols, text: &dyn Fn(u64, usize) -> Vec<u8>) -> String {
        let mut by_stack: BTreeMap<String, u64> = BTreeMap::new();
        for (place, count) in &self.counts {
            let stack = if place.kernel { stack(place, symbols, text) } else { "guest;user".to_owned() };
            *by_stack.entry(stack).or_default() += count;
        }
        let mut rows: Vec<(String, u64)> = by_stack.into_iter().collect();
        rows.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        rows.iter().fold(String::new(), |mut out, (name, count)| {
            let _ = writeln!(out, "{name} {count}");
            out
        })
    }
}

fn stack(place: &Place, symbols: &Symbols, text: &dyn Fn(u64, usize) -> Vec<u8>) -> String {
    let mut frames = vec![symbols.name(place.rip)];
    let mut inner = symbols.start(place.rip);
    for &word in &place.words {
        let caller = match call_before(word, text) {
            Some(Call::Direct(target)) => {
                let target = landing(target, text);
                target == inner || jumps(target, inner, symbols, text)
            }
            Some(Call::Indirect) => true,
            None => false,
        };
        if caller {
            // The byte before: a call that never returns may be its function's last instruction.
            frames.push(symbols.name(word - 1));
            inner = symbols.start(word - 1);
        }
    }
    frames.extend(["kernel", "guest"]);
    frames.reverse();
    frames.join(";")
}

enum Call {
    Direct(u64),
    Indirect,
}

/// The call instruction that ends at `word` (SDM vol. 2, CALL).
fn call_before(word: u64, text: &dyn Fn(u64, usize) -> Vec<u8>) -> Option<Call> {
    let bytes = text(word - 7, 7);
    let last = bytes.last_chunk::<7>()?;
    if let [_, _, 0xe8, a, b, c, d] = *last {
        return Some(Call::Direct(word.wrapping_add_signed(i32::from_le_bytes([a, b, c, d]).into())));
    }
    // FF /2 through a register, or memory with a displacement of 0, 1 or 4 bytes, with or without a SIB byte.
    let through =
        |at: usize, modrm: std::ops::RangeInclusive<u8>| last[at] == 0xff && modrm.contains(&last[at + 1]);
    let indirect = through(5, 0xd0..=0xd7)
        || through(5, 0x10..=0x17)
        || through(4, 0x50..=0x57)
        || through(1, 0x90..=0x97)
        || through(1, 0x15..=0x15)
        || through(0, 0x14..=0x14)
        || through(0, 0x94..=0x94)
        || through(3, 0x54..=0x54);
    indirect.then_some(Call::Indirect)
}

/// Where a call of `at` ends up if what is called begins with a jump.
fn landing(mut at: u64, text: &dyn Fn(u64, usize) -> Vec<u8>) -> u64 {
    for _ in 0..MOST_TRAMPOLINES {
        match *text(at, 5) {
            [0xe9, a, b, c, d] => at = (at + 5).wrapping_add_signed(i32::from_le_bytes([a, b, c, d]).into()),
            _ => break,
        }
    }
    at
}

/// Whether the function at `from` has a jump that ends up at `to`.
fn jumps(from: u64, to: u64, symbols: &Symbols, text: &dyn Fn(u64, usize) -> Vec<u8>) -> bool {
    if symbols.start(from) != from {
        return false;
    }
    let len = symbols.next(from).saturating_sub(from).min(MOST_FUNCTION_BYTES);
    let bytes = text(from, len as usize);
    bytes.windows(5).zip(from..).any(|(window, at)| match *window {
        [0xe9, ..] => landing(at, text) == to,
        _ => false,
    })
}

/// The kernel's text symbols by address.
#[derive(Debug, Default)]
pub struct Symbols {
    by_address: BTreeMap<u64, String>,
    /// Text that the kernel gives back when it has started.
    init: Range<u64>,
}

impl Symbols {
    /// Parses a `System.map`: `address type name` a line. Lines of another form are passed over.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut symbols = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            let Ok(address) = u64::from_str_radix(address, 16) else { continue };
            if matches!(kind, "t" | "T" | "w" | "W") {
                symbols.by_address.insert(address, name.to_owned());
            }
            match name {
                "_sinittext" => symbols.init.start = address,
                "_einittext" => symbols.init.end = address,
                _ => {}
            }
        }
        symbols
    }

    /// Whether `address` lies in text that a guest that has started may have overwritten.
    pub(crate) fn is_init(&self, address: u64) -> bool {
        self.init.contains(&address)
    }

    /// The symbol that `address` lies in.
    #[must_use]
    pub fn name(&self, address: u64) -> &str {
        self.by_address.range(..=address).next_back().map_or("[unknown]", |(_, name)| name.as_str())
    }

    /// Where the symbol that `address` lies in begins.
    fn start(&self, address: u64) -> u64 {
        self.by_address.range(..=address).next_back().map_or(address, |(at, _)| *at)
    }

    /// Where the next symbol begins.
    fn next(&self, address: u64) -> u64 {
        self.by_address.range(address + 1..).next().map_or(address, |(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xffff_ffff_8100_0000;

    fn symbols() -> Symbols {
        let lines = ["start 0", "middle 100", "leaf 200", "tail 300", "x"].map(|line| {
            let (name, at) = line.split_once(' ').unwrap_or((line, ""));
            let offset = u64::from_str_radix(at, 16);
            offset.map_or_else(|_| line.to_owned(), |o| format!("{:x} T {name}", BASE + o))
        });
        Symbols::parse(&lines.join("\n"))
    }

    /// `start` calls `middle` at 0x10; `middle` calls `leaf` at 0x20 and through a register at 0x30; `leaf`
    /// jumps to `tail` at its end. `start` calls `leaf` at 0x40 through two trampolines.
    fn text(at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0x90; 0x400];
        let mut relative = |at: usize, opcode: u8, to: i32| {
            bytes[at] = opcode;
            bytes[at + 1..at + 5].copy_from_slice(&(to - at as i32 - 5).to_le_bytes());
        };
        relative(0x10, 0xe8, 0x100);
        relative(0x120, 0xe8, 0x200);
        relative(0x2f0, 0xe9, 0x300);
        relative(0x40, 0xe8, 0x380);
        relative(0x380, 0xe9, 0x390);
        relative(0x390, 0xe9, 0x200);
        bytes[0x130..0x132].copy_from_slice(&[0xff, 0xd0]);
        let start = at.wrapping_sub(BASE) as usize;
        bytes.get(start..start + len).map(<[u8]>::to_vec).unwrap_or_default()
    }

    #[test]
    fn what_the_kernel_gives_back_is_known_by_its_ends() {
        let symbols = Symbols::parse("ff00 T _sinittext\nff00 T first\nff80 t last\nffa0 T _einittext\nx");
        let init: Vec<_> = [0xfeff, 0xff00, 0xff9f, 0xffa0].map(|at| symbols.is_init(at)).into();
        assert_eq!(init, [false, true, true, false]);
        assert_eq!(symbols.name(0xff10), "first");
        assert!(!Symbols::parse("ff00 T first").is_init(0xff00));
    }

    fn folded(rip: u64, stack: &[u64]) -> String {
        let mut samples = Samples::default();
        samples.add(
            true,
            BASE + rip,
            stack.iter().map(|word| if *word < 0x1000 { BASE + word } else { *word }),
        );
        samples.folded(&symbols(), &text)
    }

    #[test]
    fn samples_fold_by_symbol_most_frequent_first() {
        let mut samples = Samples::default();
        samples.add(true, BASE + 5, [].into_iter());
        for i in 0..3 {
            samples.add(true, BASE + 0x100 + i, [].into_iter());
        }
        samples.add(false, 0x40_0000, [BASE + 0x15].into_iter());
        let expected = "guest;kernel;middle 3\nguest;kernel;start 1\nguest;user 1\n";
        assert_eq!(samples.folded(&symbols(), &text), expected);
        assert_eq!(samples.total(), 5);
    }

    #[test]
    fn a_stack_is_the_calls_that_lead_to_each_other() {
        let stale = [0x7fff_0000_1234, 0x15, 0x126, 0x250];
        let stack = [&stale[..], &[0x125, 0x7777_7777, 0x15]].concat();
        assert_eq!(folded(0x208, &stack), "guest;kernel;start;middle;leaf 1\n");
    }

    #[test]
    fn indirect_calls_and_tail_jumps_are_frames_too() {
        assert_eq!(folded(0x308, &[0x132, 0x15]), "guest;kernel;start;middle;tail 1\n");
        assert_eq!(folded(0x308, &[0x125, 0x15]), "guest;kernel;start;middle;tail 1\n");
        assert_eq!(folded(0x208, &[0x45]), "guest;kernel;start;leaf 1\n");
        assert_eq!(folded(0x308, &[0x45]), "guest;kernel;start;tail 1\n");
    }
}
