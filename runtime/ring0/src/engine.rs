//! The loop: finds or decodes the block at RIP, does its instructions, takes their exceptions.

use crate::book::{Code, CodeBook};
use crate::cpu::{CODE_PAGE, Cpu, TF};
use crate::decode;
use crate::op::Op;
use crate::ram::{PAGE, Ram};
use crate::shadow::{PageMap, Touch};
use crate::stop::{Break, Flow, Stop};
use crate::tlb::Access;
use std::sync::Arc;

/// Entries of the small table before the large one.
const RECENT: usize = 2048;
/// Decoded instructions kept; beyond, all are dropped and decoding begins anew.
const MOST_OPS: usize = 1 << 18;

/// Instructions one after the other up to a branch or the end of their page.
#[derive(Clone, Copy)]
struct Block {
    rip: u64,
    /// Where in RAM its first byte is, and the first byte of its last instruction's second page, if it has one.
    at: usize,
    second: usize,
    /// Of the engine's own, or [`IN_BOOK`] and of the book's.
    first_op: u32,
    ops: u32,
}

/// The block's ops are the book's. Neither has as many.
const IN_BOOK: u32 = 1 << 31;
/// No second page; also no block, in the table of recent ones.
const NOWHERE: usize = usize::MAX;

/// One processor's ring 0. See the crate's text.
pub struct Engine {
    cpu: Cpu,
    ops: Vec<Op>,
    blocks: PageMap<Block>,
    recent: Vec<Block>,
    book: Arc<CodeBook>,
    instructions: u64,
}

impl Engine {
    /// An engine over a guest's RAM. It knows nothing of what KVM has seen: `ram` must be that of a VM whose vCPU has
    /// not run ring 3 yet, or that of one whose ring 0 has been this engine's ever since it did.
    #[must_use]
    pub fn new(ram: Ram) -> Self {
        Self::with_book(ram, Arc::default())
    }

    /// The same, with code that is known already.
    #[must_use]
    pub fn with_book(ram: Ram, book: Arc<CodeBook>) -> Self {
        Self {
            cpu: Cpu::new(ram),
            ops: Vec::new(),
            blocks: PageMap::default(),
            recent: Vec::new(),
            book,
            instructions: 0,
        }
    }

    /// The processor's state.
    #[must_use]
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// The same, to be changed.
    pub fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }

    /// Instructions done so far.
    #[must_use]
    pub fn instructions(&self) -> u64 {
        self.instructions
    }

    /// What it has decoded itself, as far as it is still there: for a [`CodeBook`].
    #[must_use]
    pub fn code(&mut self) -> Vec<Code> {
        let mut all = Vec::new();
        for block in
            self.blocks.values().filter(|block| block.second == NOWHERE && block.first_op & IN_BOOK == 0)
        {
            // Code that has run and is no code any more, as the kernel's own start, is mapped no longer.
            if self.cpu.translate(block.rip, Access::Fetch).ok() != Some(block.at) {
                continue;
            }
            let ops = &self.ops[block.first_op as usize..(block.first_op + block.ops) as usize];
            let mut bytes = vec![0; ops.iter().map(|op| usize::from(op.len)).sum()];
            self.cpu.ram.read(block.at, &mut bytes);
            all.push(Code { rip: block.rip, bytes });
        }
        all.sort_by_key(|code| code.rip);
        all
    }

    /// KVM will run ring 3 with these page tables: from now on their changes are followed. Fills `into` with what
    /// KVM must be shown first.
    pub fn enter_ring3(&mut self, into: &mut Vec<Touch>) {
        let Cpu { shadow, sregs, ram, tlb, .. } = &mut self.cpu;
        shadow.enter(ram, sregs.cr3, crate::paging::levels(sregs), &mut |page| tlb.watch(page));
        if shadow.has_touches() {
            shadow.take_touches(into);
        }
    }

    /// Takes an exception as if the instruction at RIP had raised it.
    pub fn raise(&mut self, vector: u8, code: Option<u32>, linear: u64) -> Result<(), Stop> {
        self.cpu.deliver(crate::stop::Trap { vector, code, linear })
    }

    /// Runs ring 0 from RIP until something else is called for, `fuel` instructions at most (and those of the block that
    /// it ends in).
    pub fn run(&mut self, fuel: u64) -> Stop {
        if self.cpu.flags & TF != 0 {
            return Stop::Foreign;
        }
        let end = self.work().saturating_add(fuel);
        while self.work() < end {
            if self.cpu.code_stale {
                self.forget_code();
            }
            let stop = match self.block() {
                Ok(block) => self.run_block(block),
                Err(reason) => self.take(reason),
            };
            if let Some(stop) = stop {
                return stop;
            }
        }
        Stop::Fuel
    }

    /// What fuel is taken for: instructions, and what else takes as long.
    #[must_use]
    pub fn work(&self) -> u64 {
        self.instructions.saturating_add(self.cpu.spent())
    }

    fn run_block(&mut self, block: Block) -> Option<Stop> {
        let page = block.rip & !(PAGE as u64 - 1);
        let Self { cpu, ops, instructions, book, .. } = self;
        let ops = if block.first_op & IN_BOOK == 0 {
            &ops[block.first_op as usize..(block.first_op + block.ops) as usize]
        } else {
            book.ops(block.first_op & !IN_BOOK, block.ops)
        };
        cpu.gpr[CODE_PAGE as usize] = page;
        for (index, op) in ops.iter().enumerate() {
            match (op.run)(cpu, op) {
                Ok(Flow::Next) => {}
                Ok(Flow::Jump) => {
                    *instructions += index as u64 + 1;
                    return None;
                }
                Ok(Flow::Leave(stop)) => {
                    *instructions += index as u64 + 1;
                    return Some(stop);
                }
                Err(reason) => {
                    *instructions += index as u64;
                    cpu.rip = page + u64::from(op.offset);
                    return self.take(reason);
                }
            }
        }
        *instructions += ops.len() as u64;
        if let Some(last) = ops.last() {
            cpu.rip = last.next(cpu);
        }
        None
    }

    /// What has kept the instruction at RIP from being done.
    fn take(&mut self, reason: Break) -> Option<Stop> {
        match reason {
            Break::Trap(trap) => {
                // Exceptions cost fuel too: a handler may begin with one.
                self.instructions += 1;
                self.cpu.deliver(trap).err()
            }
            Break::Stop(stop) => Some(stop),
        }
    }

    fn block(&mut self) -> Result<Block, Break> {
        let rip = self.cpu.rip;
        let at = self.cpu.translate(rip, Access::Fetch)?;
        let slot = (rip ^ (rip >> 7)) as usize % RECENT;
        if let Some(&block) = self.recent.get(slot)
            && block.rip == rip
            && block.at == at
            && block.second == NOWHERE
        {
            return Ok(block);
        }
        self.block_slowly(rip, at, slot)
    }

    #[inline(never)]
    fn block_slowly(&mut self, rip: u64, at: usize, slot: usize) -> Result<Block, Break> {
        if self.ops.len() > MOST_OPS {
            self.forget_code();
        }
        if self.recent.is_empty() {
            let none = Block { rip: 0, at: NOWHERE, second: NOWHERE, first_op: 0, ops: 0 };
            self.recent = vec![none; RECENT];
        }
        if let Some(&block) = self.blocks.get(&(rip as usize))
            && block.at == at
            && (block.second == NOWHERE || self.second_page(rip)? == block.second)
        {
            self.recent[slot] = block;
            return Ok(block);
        }
        let block = if let Some((first_op, ops)) = self.book.find(rip, &self.cpu.ram, at) {
            self.mark_code(at);
            Block { rip, at, second: NOWHERE, first_op: first_op | IN_BOOK, ops }
        } else {
            self.decode(rip, at)?
        };
        self.blocks.insert(rip as usize, block);
        self.recent[slot] = block;
        Ok(block)
    }

    fn second_page(&mut self, rip: u64) -> Result<usize, Break> {
        let next = (rip | (PAGE as u64 - 1)).wrapping_add(1);
        self.cpu.translate(next, Access::Fetch)
    }

    fn decode(&mut self, rip: u64, at: usize) -> Result<Block, Break> {
        let first_op = self.ops.len() as u32;
        let here = (PAGE - rip as usize % PAGE).min(decode::MOST_BYTES);
        let mut bytes = [0; decode::MOST_BYTES];
        self.cpu.ram.read(at, &mut bytes[..here]);
        self.mark_code(at);
        let mut second = NOWHERE;
        let done = decode::block(rip, &bytes[..here], &mut self.ops);
        if !done {
            // Its first instruction reaches into the next page.
            second = self.second_page(rip)?;
            let whole = (here + decode::LONGEST).min(decode::MOST_BYTES);
            self.cpu.ram.read(second, &mut bytes[here..whole]);
            self.mark_code(second);
            decode::one(rip, &bytes[..whole], &mut self.ops);
        }
        Ok(Block { rip, at, second, first_op, ops: self.ops.len() as u32 - first_op })
    }

    fn mark_code(&mut self, at: usize) {
        if self.cpu.shadow.mark_code(at) {
            self.cpu.tlb.watch(at);
        }
    }

    /// Forgets what it has decoded; the book stays.
    pub fn forget_code(&mut self) {
        self.cpu.code_stale = false;
        self.ops.clear();
        self.blocks.clear();
        self.recent.clear();
        self.cpu.shadow.forget_code();
    }
}
