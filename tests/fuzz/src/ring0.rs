//! The engine that runs ring 0: any code, registers and page tables, and instructions of known outcome.
//!
//! Promises: nothing but the guest's RAM is touched (guard pages); no code makes it panic; a run does no more
//! than its fuel and one block, however tables loop; it runs 64-bit ring 0 alone, and what it leaves is a state
//! that a processor can be in; a touch is of eight bytes of RAM that its linear address can mean. Of single
//! stores, REP MOVSB, REP STOSB and the doorbell an [`crate::oracle`] says what must have become of memory.

use crate::cpu::general;
use crate::doorbell::{COPY, Call, FILL, What, length};
use crate::oracle::{Ram, Who, walk};
use crate::ring0_code::{self as code, CODE, CODE_FRAME, SYSTEM, SYSTEM_FRAME, write_system};
use crate::tables::{
    Machine, PAGE, PD, PT1, address, fill_tables, read, set_control, with_machine, write_tables,
};
use arbitrary::{Result, Unstructured};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use peregrine_ring0::{BULK_PORT, Engine, Ram as EngineRam, Stop, Touch};
use peregrine_vmm::doorbell::MAX_BYTES;
use std::sync::Arc;
use vm_memory::{Bytes as _, GuestAddress};

/// What CR3 can hold.
const CR3: u64 = (1 << 52) - 1;
const CR4_PGE: u64 = 1 << 7;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_PKE: u64 = 1 << 22;
const TF: u64 = 1 << 8;
const VM: u64 = 1 << 17;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;
/// Instructions of a block, which is done to its end.
const BLOCK: u64 = 48;
/// What one block may cost beyond its instructions: the doorbell's share, in units of 64 bytes, and page tables
/// that its stores make and break.
const BLOCK_WORK: u64 = MAX_BYTES / 64 + 300_000;
/// Fuel of one run of a REP instruction, and runs in which it must have come to its end.
const PLENTY: u64 = 1 << 16;
const MOST_RUNS: usize = 1 << 7;

/// One execution of any code.
pub fn target(data: &[u8]) {
    with_machine(data, |machine, u| {
        if u.ratio(1, 4)? { known(machine, u, Known::instruction) } else { any_code(machine, u) }
    });
}

/// One of the doorbell.
pub fn doorbell(data: &[u8]) {
    with_machine(data, |machine, u| known(machine, u, Known::doorbell));
}

fn engine(machine: &Machine) -> Engine {
    Engine::new(EngineRam::new(Arc::clone(&machine.mem)))
}

/// Ring 0's segments and descriptor tables.
fn kernel_sregs(machine: &Machine) -> kvm_sregs {
    let mut sregs = machine.cpu.sregs;
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x10, type_: 11, l: 1, ..flat };
    sregs.ss = kvm_segment { selector: 0x18, type_: 3, db: 1, ..flat };
    (sregs.gdt.base, sregs.gdt.limit) = (SYSTEM + code::GDT, 0x3f);
    (sregs.idt.base, sregs.idt.limit) = (SYSTEM + code::IDT, 0x1ff);
    (sregs.tr.base, sregs.tr.limit) = (SYSTEM + code::TSS, 0x67);
    sregs
}

/// Tells what KVM would be told, and checks it.
fn enter_ring3(engine: &mut Engine) {
    let mut touches: Vec<Touch> = Vec::new();
    engine.enter_ring3(&mut touches);
    let bytes = engine.cpu().ram().bytes();
    for touch in &touches {
        let within = touch.at as u64 % PAGE;
        assert!(touch.at < bytes && (within.is_multiple_of(8) || within == 4), "{touch:x?} is of no entry");
        assert_eq!(touch.linear % PAGE, within, "{touch:x?} means another place");
    }
    assert!(touches.len() <= 4 * bytes / PAGE as usize, "more than four entries of a table");
    touches.clear();
    engine.enter_ring3(&mut touches);
    assert!(touches.is_empty(), "{touches:x?} came again");
}

/// Runs, and checks what it took.
fn run(engine: &mut Engine, fuel: u64) -> Stop {
    let (instructions, work) = (engine.instructions(), engine.work());
    let stop = engine.run(fuel);
    let instructions = engine.instructions() - instructions;
    let most = if fuel == 0 { 0 } else { fuel.saturating_add(BLOCK) };
    assert!(instructions <= most, "{instructions} instructions for {fuel}");
    let work = engine.work() - work;
    assert!(work <= most.saturating_add(BLOCK_WORK), "work of {work} for {fuel}");
    assert!(stop != Stop::Fuel || work >= fuel, "work of {work} ended {fuel}");
    check_state(engine, stop);
    stop
}

/// The state that is left to KVM.
fn check_state(engine: &Engine, stop: Stop) {
    let (regs, sregs) = (engine.cpu().regs(), &engine.cpu().sregs);
    assert_eq!(regs.rflags & (2 | VM), 2, "flags {:#x}", regs.rflags);
    assert_eq!(sregs.cr3 >> 52, 0, "CR3 {:#x}", sregs.cr3);
    let canonical = |linear: u64| {
        let sign = linear as i64 >> if sregs.cr4 & CR4_LA57 == 0 { 47 } else { 56 };
        sign == 0 || sign == -1
    };
    for base in [sregs.fs.base, sregs.gs.base, engine.cpu().kernel_gs] {
        assert!(canonical(base), "a segment at {base:#x}");
    }
    let ring: u8 = if stop == Stop::Ring3 { 3 } else { 0 };
    let (cs, ss) = (&sregs.cs, &sregs.ss);
    assert_eq!((cs.l, cs.dpl, cs.selector & 3), (1, ring, u16::from(ring)), "{stop:?} with {cs:x?}");
    assert_eq!(ss.selector & 3, u16::from(ring), "{stop:?} with {ss:x?}");
    assert!(ss.unusable == 1 && ring == 0 || ss.dpl == ring && ss.type_ & 10 == 2, "{stop:?} with {ss:x?}");
    if stop == Stop::Ring3 {
        assert!(canonical(regs.rip), "a program at {:#x}", regs.rip);
    } else {
        assert_eq!(regs.rflags & TF, 0, "ring 0 is single-stepped");
    }
}

/// Any code, in several runs with programs, devices and exceptions in between.
fn any_code(machine: &mut Machine, u: &mut Unstructured<'_>) -> Result<()> {
    let mut ram = machine.ram();
    set_control(&mut machine.cpu, u)?;
    machine.cpu.sregs.cr4 |= if u.arbitrary()? { CR4_SMEP } else { 0 };
    machine.cpu.sregs.cr3 &= CR3;
    let low = &mut ram.ranges[0].1;
    write_tables(low, Who::Supervisor, u)?;
    let long = u.ratio(1, 16)?;
    if long {
        fill(low, u)?;
    }
    code::map(low, 3);
    let high = &mut ram.ranges[1].1;
    write_system(&mut high[(SYSTEM_FRAME - 0x2_0000) as usize..][..PAGE as usize], u)?;
    code::write(&mut high[(CODE_FRAME - 0x2_0000) as usize..][..2 * PAGE as usize], long, u)?;
    machine.load(&ram);
    let mut engine = engine(machine);
    let sregs = kernel_sregs(machine);
    engine.cpu_mut().set_sregs(&sregs);
    engine.cpu_mut().kernel_gs = address_of_48_bits(u)?;
    engine.cpu_mut().star = if u.arbitrary()? { Some(0x23_0010 << 32) } else { None };
    engine.cpu_mut().set_regs(&registers(machine.cpu.regs.rflags, u)?);
    for _ in 0..u.int_in_range(1..=5)? {
        turn(machine, &mut engine, &sregs, u)?;
    }
    enter_ring3(&mut engine);
    Ok(())
}

fn turn(machine: &Machine, engine: &mut Engine, sregs: &kvm_sregs, u: &mut Unstructured<'_>) -> Result<()> {
    if u.ratio(1, 2)? {
        enter_ring3(engine);
    }
    if u.ratio(1, 4)? {
        // A device, or the VMM, writes to RAM unseen.
        let at = *u.choose(&[0_u64, 0x1000, 0x2000, 0x3000, 0x4000, SYSTEM_FRAME, CODE_FRAME])?;
        let word = code::value(u)?;
        let at = at + u.int_in_range(0..=511_u64)? * 8;
        machine.mem.write_obj(word, GuestAddress(at)).unwrap_or_else(|e| panic!("{e}"));
    }
    let fuel = match u.int_in_range(0..=7)? {
        0 => 0,
        1 => 1,
        2 => 2000,
        _ => u.int_in_range(1..=200)?,
    };
    let stop = run(engine, fuel);
    let cpu = engine.cpu_mut();
    let mut regs = cpu.regs();
    match stop {
        Stop::Fuel => return Ok(()),
        Stop::Ring3 => {
            enter_ring3(engine);
            let mut trapped = *sregs;
            trapped.cr3 = engine.cpu().sregs.cr3;
            engine.cpu_mut().set_sregs(&trapped);
            regs = registers(regs.rflags & !TF, u)?;
        }
        Stop::TripleFault => {
            engine.cpu_mut().set_sregs(sregs);
            regs = registers(2, u)?;
        }
        Stop::Halt | Stop::Foreign if u.ratio(1, 4)? => {
            let (vector, linear) = (u.int_in_range(0..=31)?, u.arbitrary()?);
            let stop = engine.raise(vector, u.arbitrary()?, linear);
            assert!(matches!(stop, Ok(()) | Err(Stop::TripleFault)), "{stop:?}");
            check_state(engine, Stop::Foreign);
            return Ok(());
        }
        // KVM does it.
        Stop::Halt | Stop::Foreign => regs.rip = regs.rip.wrapping_add(u.int_in_range(1..=3)?),
    }
    engine.cpu_mut().set_regs(&regs);
    let linear = code::value(u)?;
    if let Some(at) = engine.cpu_mut().locate(linear) {
        assert!(
            at < engine.cpu().ram().bytes() && at as u64 % PAGE == linear % PAGE,
            "{linear:#x} at {at:#x}"
        );
    }
    Ok(())
}

fn address_of_48_bits(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(((address(u)? as i64) << 16 >> 16) as u64)
}

/// Registers that point to what there is.
fn registers(rflags: u64, u: &mut Unstructured<'_>) -> Result<kvm_regs> {
    let mut regs = kvm_regs { rip: CODE + u.int_in_range(0..=15_u64)?, rflags, ..Default::default() };
    for register in general(&mut regs) {
        *register = code::value(u)?;
    }
    if u.ratio(7, 8)? {
        // A stack, between tables and code.
        regs.rsp = *u.choose(&[SYSTEM + 0xe00, SYSTEM + 0xe08, CODE + 0x1ff8, 0xffff_8800_0000_4800])?;
        regs.rcx &= 0xffff;
    }
    Ok(regs)
}

/// An instruction of known outcome, with a HLT behind it.
struct Known {
    code: Vec<u8>,
    regs: kvm_regs,
    what: What,
    to: u64,
    len: u64,
    /// RCX counts down what is left.
    counted: bool,
    most: u64,
}

impl Known {
    fn doorbell(u: &mut Unstructured<'_>, long: bool) -> Result<Self> {
        let any: u32 = u.arbitrary()?;
        let operation = *u.choose(&[COPY, COPY, COPY, COPY, FILL, FILL, FILL, any])?;
        let (to, from, len) = operands(u, long)?;
        // Of RAX and RDX the lower halves count.
        let (rax, rdx) = (u64::from(operation) | 1 << 40, u64::from(BULK_PORT) | 0xdead_0000);
        let regs = kvm_regs { rax, rdx, rdi: to, rsi: from, rcx: len, ..Default::default() };
        let what = What::of(operation, from);
        Ok(Self { code: vec![0xef], regs, what, to, len, counted: true, most: MAX_BYTES })
    }

    fn instruction(u: &mut Unstructured<'_>, long: bool) -> Result<Self> {
        let (to, from, bytes) = operands(u, long)?;
        let byte: u8 = u.arbitrary()?;
        let rax = u64::from_le_bytes([byte; 8]);
        let mut regs = kvm_regs { rax, rdi: to, rsi: from, rsp: to.wrapping_add(8), ..Default::default() };
        let kind: u8 = u.int_in_range(0..=12)?;
        let len = if kind < 4 { bytes } else { 1 << (kind & 3) };
        let (code, what, len): (&[u8], _, _) = match kind {
            0 | 1 => (&[0xf3, 0xa4], What::Copy, len),
            2 | 3 => (&[0xf3, 0xaa], What::Fill(byte), len),
            // MOV and XCHG of 1, 2, 4 and 8 bytes.
            4 => (&[0x88, 0x07], What::Store(byte), len),
            5 => (&[0x66, 0x89, 0x07], What::Store(byte), len),
            6 => (&[0x89, 0x07], What::Store(byte), len),
            7 => (&[0x48, 0x89, 0x07], What::Store(byte), len),
            8 => (&[0x86, 0x07], What::Store(byte), len),
            9 => (&[0x66, 0x87, 0x07], What::Store(byte), len),
            10 => (&[0x87, 0x07], What::Store(byte), len),
            11 => (&[0x48, 0x87, 0x07], What::Store(byte), len),
            _ => (&[0x50], What::Store(byte), 8),
        };
        let counted = kind < 4;
        if counted {
            regs.rcx = len;
        }
        Ok(Self { code: code.to_vec(), regs, what, to, len, counted, most: u64::MAX })
    }
}

/// Six megabytes that are mapped: calls may be as long as calls are.
fn fill(low: &mut [u8], u: &mut Unstructured<'_>) -> Result<()> {
    fill_tables(low, Who::Supervisor, u)?;
    for at in [PD + 16, PD + 24] {
        low[at as usize..][..8].copy_from_slice(&(PT1 | 7).to_le_bytes());
    }
    Ok(())
}

/// Target, source and length.
fn operands(u: &mut Unstructured<'_>, long: bool) -> Result<(u64, u64, u64)> {
    if !long || u.ratio(1, 4)? {
        // Now and then what would be an address if its upper bits did not count.
        let odd = if u.ratio(1, 32)? { 1 << u.int_in_range(48..=63)? } else { 0 };
        return Ok((address(u)? ^ odd, address(u)?, length(u)?));
    }
    let mut start = || Ok(u.choose(&code::FILLED)? + u64::from(u.arbitrary::<u8>()?));
    let (to, from) = (start()?, start()?);
    Ok((to, from, *u.choose(&[MAX_BYTES - 1, MAX_BYTES, MAX_BYTES + 1, MAX_BYTES + (1 << 20)])?))
}

/// Up to three such instructions one after the other, tables as the one before has left them.
fn known(
    machine: &mut Machine,
    u: &mut Unstructured<'_>,
    next: fn(&mut Unstructured<'_>, bool) -> Result<Known>,
) -> Result<()> {
    let mut ram = machine.ram();
    set_control(&mut machine.cpu, u)?;
    let smep = u.arbitrary()?;
    let sregs = &mut machine.cpu.sregs;
    // KVM has protection keys only where this engine has no business.
    sregs.cr4 = sregs.cr4 & !CR4_PKE | if smep { CR4_SMEP } else { 0 };
    sregs.cr3 &= CR3;
    let rights = *u.choose(&[1, 1, 1, 1, 3, 1 | USER, 1 | NO_EXECUTE])?;
    let low = &mut ram.ranges[0].1;
    write_tables(low, Who::Supervisor, u)?;
    let long = u.ratio(1, 32)?;
    if long {
        fill(low, u)?;
    }
    code::map(low, rights);
    machine.load(&ram);
    let mut engine = engine(machine);
    if u.arbitrary()? {
        engine.cpu_mut().set_sregs(&machine.cpu.sregs);
        enter_ring3(&mut engine);
    }
    let count = u.int_in_range(0..=2)?;
    for number in 0..count {
        // Each has a place of its own: the engine need not see that code changes from outside.
        if !next(u, long)?.check(machine, &mut engine, ram, number * 64) {
            return Ok(());
        }
        ram = machine.snapshot();
        // Translations end, for both halves.
        machine.cpu.sregs.cr4 ^= CR4_PGE;
    }
    next(u, long)?.check(machine, &mut engine, ram, count * 64);
    enter_ring3(&mut engine);
    Ok(())
}

impl Known {
    /// False if there is no telling what was done.
    fn check(self, machine: &mut Machine, engine: &mut Engine, mut ram: Ram, place: u64) -> bool {
        let cpu = &machine.cpu;
        let mut code = self.code.clone();
        code.push(0xf4);
        if let Some(page) = ram.page(CODE_FRAME) {
            page[place as usize..][..code.len()].copy_from_slice(&code);
        }
        machine.mem.write_slice(&code, GuestAddress(CODE_FRAME + place)).unwrap_or_else(|e| panic!("{e}"));
        let mut sregs = kernel_sregs(machine);
        // No exception has a handler.
        sregs.idt.limit = 0;
        let before = kvm_regs { rip: CODE + place, rflags: cpu.regs.rflags, ..self.regs };
        engine.cpu_mut().set_sregs(&sregs);
        engine.cpu_mut().set_regs(&before);
        let work = engine.work();
        let overwritten = || read(&machine.mem, CODE_FRAME + place, code.len()) != code;
        let mut stop = Stop::Fuel;
        for _ in 0..MOST_RUNS {
            stop = run(engine, PLENTY);
            if stop != Stop::Fuel || overwritten() {
                break;
            }
        }
        let after = engine.cpu().regs();
        let fetched = walk(&mut ram, cpu, 0, Who::Fetch, before.rip, false).map(|reached| reached.gpa);
        let moved = fetched.is_some_and(|gpa| gpa != CODE_FRAME + place);
        if moved || overwritten() {
            // The one before has changed where code is, or this one has written over itself: anything was done.
            return false;
        }
        let done = self.done(stop, &before, &after);
        assert!(engine.work() - work >= done / 64, "{done} bytes took nothing");
        assert!(done <= self.most, "{done} bytes at once");
        let executable = fetched.is_some();
        assert!(executable || stop != Stop::Halt, "code was fetched that is not executable");
        let what = if executable { self.what } else { What::Nothing };
        // Of pages that are watched less is done.
        let long = engine.work() - work >= MAX_BYTES / 64;
        let most = if long && self.most == MAX_BYTES { done } else { self.most };
        let call = Call { what, to: self.to, from: self.regs.rsi, len: self.len, done, most, pkru: 0 };
        call.check(cpu, ram, &machine.mem);
        true
    }

    /// Bytes done, of an instruction that has left registers as it may.
    fn done(&self, stop: Stop, before: &kvm_regs, after: &kvm_regs) -> u64 {
        let completed = before.rip + self.code.len() as u64;
        assert!(matches!(stop, Stop::Halt | Stop::Foreign | Stop::TripleFault), "{stop:?}");
        assert_eq!(after.rip, if stop == Stop::Halt { completed } else { before.rip });
        if !self.counted {
            let pushed = self.code == [0x50] && stop == Stop::Halt;
            assert_eq!(after.rsp, before.rsp.wrapping_sub(if pushed { 8 } else { 0 }));
            return if stop == Stop::Halt { self.len } else { 0 };
        }
        assert!(after.rcx <= before.rcx, "RCX went up");
        let done = before.rcx - after.rcx;
        let moves = self.most == u64::MAX;
        let target = before.rdi.wrapping_add(if moves { done } else { 0 });
        let source = before.rsi.wrapping_add(if moves && self.what == What::Copy { done } else { 0 });
        let expected = kvm_regs { rip: after.rip, rcx: after.rcx, rdi: target, rsi: source, ..*before };
        assert_eq!(*after, expected, "other registers changed");
        assert!(!moves || stop != Stop::Halt || done == self.len, "REP ended with {} left", after.rcx);
        done
    }
}
