//! Random instructions, done by the engine and by this machine's processor: registers, flags, memory and faults must be
//! the same.

use super::guest::{DIRECT, Guest, IST_TOP};
use super::instructions::{Case, Cases};
use super::native::{CODE_PAGES, GS_BASE, Native, Outcome, PAGE, State, WRITABLE_PAGES};
use super::undefined;
use crate::alu::ARITHMETIC;
use crate::cpu::{RCX, RF, RSP};
use crate::paging::{PRESENT, WRITABLE};
use crate::stop::Stop;
use iced_x86::{Code, FastFormatter, Mnemonic};
use std::collections::HashSet;
use std::fmt::Write as _;

const NOP: u8 = 0x90;
/// In a page fault's error code: the access was a program's.
const FAULT_USER: u64 = 4;

/// The guest and the processor, with the same pages at the same addresses.
struct Pair<'a> {
    native: &'a mut Native,
    guest: Guest,
    /// The writable data as the guest has it.
    memory: u64,
    /// Room to compare it in.
    bytes: Vec<u8>,
}

impl<'a> Pair<'a> {
    fn new(native: &'a mut Native) -> Self {
        let mut guest = Guest::new();
        for page in 0..CODE_PAGES {
            let gpa = guest.page();
            guest.map(native.code() + page * PAGE, gpa, PRESENT | WRITABLE);
        }
        let mut memory = 0;
        for page in (0..=WRITABLE_PAGES).rev() {
            let gpa = guest.page();
            let rights = if page == WRITABLE_PAGES { PRESENT } else { PRESENT | WRITABLE };
            guest.map(native.data() + page * PAGE, gpa, rights);
            guest.write_bytes(gpa, &[page as u8 + 1; PAGE as usize]);
            memory = gpa;
        }
        native.memory().chunks_mut(PAGE as usize).zip(1..).for_each(|(page, byte)| page.fill(byte));
        guest.engine.cpu_mut().sregs.gs.base = GS_BASE;
        Self { native, guest, memory, bytes: vec![0; (WRITABLE_PAGES * PAGE) as usize] }
    }

    /// Where the guest has a byte of the writable data: its pages are the last first.
    fn gpa(&self, linear: u64) -> u64 {
        let within = linear - self.native.data();
        self.memory - within / PAGE * PAGE + within % PAGE
    }

    fn poke(&mut self, at: u64, bytes: &[u8]) {
        for (linear, byte) in (at..).zip(bytes) {
            let gpa = self.gpa(linear);
            self.guest.write_bytes(gpa, &[*byte]);
            let within = (linear - self.native.data()) as usize;
            self.native.memory()[within] = *byte;
        }
    }

    /// Puts the instruction where it belongs, and what ends a run where it may go.
    fn place(&mut self, case: &Case) {
        let cpu = self.guest.engine.cpu_mut();
        let mut store = |at: u64, bytes: &[u8]| {
            for (linear, &byte) in (at..).zip(bytes) {
                cpu.store(linear, 1, u64::from(byte)).unwrap();
            }
        };
        for (number, landing) in (0..).zip(case.landings) {
            store(landing, &[0xf4]);
            let code = self.native.landing(landing, number);
            self.native.write_code(landing, &code);
        }
        let mut code = vec![NOP; case.lead as usize];
        code.extend(&case.bytes);
        store(case.at - case.lead, &code);
        self.native.write_code(case.at - case.lead, &code);
    }

    fn run_engine(&mut self, case: &Case) -> Result<(Outcome, State), String> {
        let cpu = self.guest.engine.cpu_mut();
        cpu.gpr[..16].copy_from_slice(&case.state.registers);
        cpu.flags = case.state.flags;
        let stop = self.guest.run_at(case.at - case.lead);
        if stop != Stop::Halt {
            return Err(format!("the engine stops: {stop:?}"));
        }
        let cpu = self.guest.engine.cpu();
        let mut after = State { registers: [0; 16], flags: cpu.flags };
        after.registers.copy_from_slice(&cpu.gpr[..16]);
        let rip = self.guest.rip();
        if let Some(number) = case.landings.iter().position(|&landing| landing == rip) {
            return Ok((Outcome::Landed(number as u64), after));
        }
        let vector = self.guest.vector().ok_or_else(|| format!("the engine is at {rip:#x}"))?;
        let frame = self.guest.frame(DIRECT + IST_TOP);
        if frame.rip != case.at {
            return Err(format!("the frame has rip {:#x}", frame.rip));
        }
        (after.registers[RSP as usize], after.flags) = (frame.rsp, frame.flags);
        let linear = if vector == 14 { cpu.sregs.cr2 } else { 0 };
        Ok((Outcome::Trap { vector, code: frame.code.unwrap_or(0), linear }, after))
    }

    fn run_native(&mut self, case: &Case) -> (Outcome, State) {
        let (outcome, after) = self.native.run(case.at - case.lead, &case.state);
        let outcome = match outcome {
            Outcome::Trap { vector, code, linear } => {
                Outcome::Trap { vector, code: code & !FAULT_USER, linear }
            }
            landed => landed,
        };
        (outcome, after)
    }

    /// Does an instruction on both sides and tells what is not the same.
    fn compare(&mut self, case: &Case) -> Result<Outcome, String> {
        for (at, bytes) in &case.pokes {
            self.poke(*at, bytes);
        }
        self.place(case);
        let (expected, theirs) = self.run_native(case);
        let (found, ours) = self.run_engine(case)?;
        let mut wrong = String::new();
        if found != expected && !is_same_but_for_order(case, found, expected) {
            let _ = writeln!(wrong, "ends with {found:x?}, not {expected:x?}");
        }
        let pairs = ours.registers.into_iter().zip(theirs.registers);
        for (number, (ours, theirs)) in pairs.enumerate() {
            if (ours ^ theirs) & !undefined_bits(case, number) != 0 {
                let _ = writeln!(wrong, "register {number} is {ours:#x}, not {theirs:#x}");
            }
        }
        let compared = !(RF | self.undefined_flags(case, expected));
        if (ours.flags ^ theirs.flags) & compared != 0 {
            let _ = writeln!(wrong, "flags are {:#x}, not {:#x}", ours.flags, theirs.flags);
        }
        self.compare_memory(&mut wrong);
        if wrong.is_empty() { Ok(expected) } else { Err(wrong) }
    }

    fn undefined_flags(&self, case: &Case, outcome: Outcome) -> u64 {
        let compares = matches!(case.insn.mnemonic(), m if is_compare(m));
        match outcome {
            // Rounds before the fault may have left theirs.
            Outcome::Trap { .. } if compares => ARITHMETIC,
            Outcome::Trap { .. } => 0,
            Outcome::Landed(_) => undefined::flags(&case.insn, case.state.registers[RCX as usize] as u8),
        }
    }

    fn compare_memory(&mut self, wrong: &mut String) {
        for page in 0..WRITABLE_PAGES {
            let gpa = self.gpa(self.native.data() + page * PAGE);
            let within = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            self.guest.read_bytes(gpa, &mut self.bytes[within]);
        }
        let theirs = self.native.memory();
        if theirs == self.bytes {
            return;
        }
        let different = (0..theirs.len()).filter(|&at| theirs[at] != self.bytes[at]);
        for at in different.take(8) {
            let _ = writeln!(wrong, "data byte {at:#x} is {:#x}, not {:#x}", self.bytes[at], theirs[at]);
        }
    }
}

/// Which of its two operands CMPS reads first is nobody's business.
fn is_same_but_for_order(case: &Case, found: Outcome, expected: Outcome) -> bool {
    let traps = matches!(
        (found, expected),
        (Outcome::Trap { vector: 14, code: 0, .. }, Outcome::Trap { vector: 14, code: 0, .. })
    );
    traps && is_compare(case.insn.mnemonic())
}

fn is_compare(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Scasb | M::Scasw | M::Scasd | M::Scasq | M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq)
}

/// Bits of a register that an instruction leaves undefined.
fn undefined_bits(case: &Case, number: usize) -> u64 {
    let insn = &case.insn;
    let scan = matches!(insn.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr);
    // Of zero; processors leave the register, but differ in what they do to the upper half.
    if scan && undefined::bits(insn) == 32 && insn.op0_register().number() == number {
        u64::MAX << 32
    } else {
        0
    }
}

fn describe(case: &Case, data: u64) -> String {
    let mut text = String::new();
    FastFormatter::new().format(&case.insn, &mut text);
    let hex: Vec<String> = case.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let _ = write!(text, "\n  {} at {:#x}, data at {data:#x}", hex.join(" "), case.at);
    let _ = write!(text, "\n  found {:#x?}", case.state);
    for (at, bytes) in &case.pokes {
        let _ = write!(text, "\n  at {at:#x}: {bytes:02x?}");
    }
    text
}

/// Does `count` random instructions; all failures are told, the first of each encoding. If `watched`, the data are
/// page tables that KVM knows, so that each store is looked at.
fn compare(seed: u64, count: u64, watched: bool) {
    println!("seed {seed:#x}");
    let mut native = Native::lock();
    let mut cases = Cases::new(seed, native.code(), native.data());
    let mut pair = Pair::new(&mut native);
    if watched {
        pair.watch();
    }
    let mut done: HashSet<Code> = HashSet::new();
    let mut failed: Vec<(Code, String)> = Vec::new();
    for number in 0..count {
        let case = cases.next();
        let code = case.insn.code();
        match pair.compare(&case) {
            Ok(Outcome::Landed(_)) => _ = done.insert(code),
            Ok(_) => {}
            Err(wrong) => {
                if failed.iter().all(|(other, _)| *other != code) {
                    let what = describe(&case, pair.native.data());
                    failed.push((code, format!("seed {seed:#x}, case {number}: {what}\n{wrong}")));
                }
                pair.resynchronise();
            }
        }
    }
    let told: Vec<String> = failed.into_iter().map(|(code, text)| format!("{code:?}: {text}")).collect();
    assert!(told.is_empty(), "{} encodings differ:\n{}", told.len(), told.join("\n"));
    let missing: Vec<Code> = cases.codes().filter(|code| !done.contains(code)).collect();
    assert!(missing.is_empty(), "never done: {missing:?}");
}

impl Pair<'_> {
    /// Makes the data page tables of a root in use: one of each level but the root's.
    fn watch(&mut self) {
        let root = self.guest.page();
        let mut above = root;
        for page in 0..WRITABLE_PAGES {
            let table = self.gpa(self.native.data() + page * PAGE);
            // Where the data of that page have it, if it is not the root.
            self.guest.write(above, table | PRESENT | WRITABLE);
            above = table;
        }
        let cpu = self.guest.engine.cpu_mut();
        let own = std::mem::replace(&mut cpu.sregs.cr3, root);
        self.guest.engine.enter_ring3(&mut Vec::new());
        self.guest.engine.cpu_mut().sregs.cr3 = own;
        self.resynchronise();
    }

    /// After a difference: the guest's memory is the processor's again.
    fn resynchronise(&mut self) {
        for page in 0..WRITABLE_PAGES {
            let gpa = self.gpa(self.native.data() + page * PAGE);
            let within = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            self.guest.write_bytes(gpa, &self.native.memory()[within]);
        }
    }
}

/// A number from the environment: for longer runs than everybody's.
pub(super) fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

#[test]
fn instructions_do_what_this_processor_does() {
    compare(number("RING0_SEED", 1), number("RING0_CASES", 300_000), false);
}

#[test]
fn instructions_that_write_to_page_tables_do_what_this_processor_does() {
    compare(number("RING0_SEED", 2), number("RING0_CASES", 200_000), true);
}
