//! Fuel: no guest makes a run much longer than it was meant to be.

use super::guest::{DIRECT, Guest, ROOT};
use crate::cpu::{RAX, RCX, RDI, RDX, RSI};
use crate::paging::{PRESENT, USER, WRITABLE};
use crate::stop::Stop;

const TABLE: u64 = PRESENT | WRITABLE | USER;

impl Guest {
    /// Instructions of a run with little fuel.
    fn instructions_of(&mut self, rip: u64, fuel: u64) -> u64 {
        let before = self.engine.instructions();
        self.engine.cpu_mut().rip = rip;
        assert_eq!(self.engine.run(fuel), Stop::Fuel);
        self.engine.instructions() - before
    }
}

#[test]
fn of_many_long_instructions_in_a_block_each_is_the_last() {
    let mut guest = Guest::new();
    guest.set_reg(RDX, u64::from(crate::BULK_PORT));
    // out dx, eax; rep stosb; repe scasb; rep lodsb, each of 256 KiB
    for (instruction, rax) in [(&[0xef][..], 2), (&[0xf3, 0xaa], 0), (&[0xf3, 0xae], 0), (&[0xf3, 0xac], 0)] {
        guest.set_reg(RAX, rax);
        guest.set_reg(RDI, DIRECT + 0x40_0000);
        guest.set_reg(RSI, DIRECT + 0x40_0000);
        let mut code = vec![0xb9, 0, 0, 4, 0];
        code.extend(instruction);
        let at = guest.code(&code.repeat(6));
        assert!(guest.instructions_of(at, 2) <= 2);
    }
}

#[test]
fn rounds_of_a_string_instruction_are_as_long_as_instructions() {
    let mut guest = Guest::new();
    for code in [&[0xf3, 0xac][..], &[0xf3, 0xae], &[0xfd, 0xf3, 0xaa]] {
        let at = guest.code(code);
        let (all, most) = (1 << 20, 1 << 14);
        guest.set_reg(RCX, all);
        guest.set_reg(RSI, DIRECT + 0x40_0000);
        guest.set_reg(RDI, DIRECT + 0x60_0000);
        guest.set_reg(RAX, 0);
        guest.instructions_of(at, 2);
        assert!(guest.reg(RCX) >= all - most && guest.reg(RCX) < all);
    }
}

#[test]
fn a_store_that_makes_many_tables_takes_fuel_for_them() {
    let mut guest = Guest::new();
    let directory = guest.page();
    for index in 0..512 {
        guest.write(directory + index * 8, (0x20_0000 + index * 0x1000) | TABLE);
    }
    // Another entry of the root's lower half, so that it stays a root.
    guest.map_at(0x4000_0000_0000, 0, 2);
    guest.engine.enter_ring3(&mut Vec::new());
    // xchg [rdi], rax; jmp to it
    let at = guest.code(&[0x48, 0x87, 0x07, 0xeb, 0xfb]);
    guest.set_reg(RDI, DIRECT + ROOT + 3 * 8);
    guest.set_reg(RAX, directory | TABLE);
    let done = guest.instructions_of(at, 5000);
    assert!(done <= 2, "{done} instructions, each of 512 tables");
    assert!(guest.instructions_of(at, 5000) <= 2, "nor when it takes them away");
}
