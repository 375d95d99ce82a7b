//! Why an instruction did not go on to the next one.

/// Why the engine stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The guest returned to ring 3: all registers are those of the program.
    Ring3,
    /// At a HLT, or at the STI before one: KVM waits for the interrupt.
    Halt,
    /// At an instruction that is KVM's to do.
    Foreign,
    /// It has run for as long as it was given.
    Fuel,
    /// An exception could not be delivered, nor the double fault after it.
    TripleFault,
}

/// An exception to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trap {
    pub(crate) vector: u8,
    pub(crate) code: Option<u32>,
    /// The address of a page fault.
    pub(crate) linear: u64,
}

/// Why an instruction was not completed: nothing it does has happened, but for the rounds of a string
/// instruction that were complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Break {
    /// It faults.
    Trap(Trap),
    /// The engine stops at it.
    Stop(Stop),
}

/// What follows a completed instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// The one behind it.
    Next,
    /// The one that RIP points to.
    Jump,
    /// Nothing: the engine stops, RIP is set.
    Leave(Stop),
}

pub(crate) type Exec = Result<Flow, Break>;

fn trap(vector: u8, code: Option<u32>) -> Break {
    Break::Trap(Trap { vector, code, linear: 0 })
}

pub(crate) fn divide_error() -> Break {
    trap(0, None)
}

pub(crate) fn undefined_opcode() -> Break {
    trap(6, None)
}

pub(crate) fn general_protection() -> Break {
    trap(13, Some(0))
}

pub(crate) fn page_fault(linear: u64, code: u32) -> Break {
    Break::Trap(Trap { vector: 14, code: Some(code), linear })
}

/// The instruction is left to KVM.
pub(crate) fn foreign() -> Break {
    Break::Stop(Stop::Foreign)
}
