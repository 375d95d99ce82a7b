//! From an instruction's bytes to what does it.
//!
//! What is not in the tables here is left to KVM, which costs an exit and is always right.

use crate::cpu::{CODE_PAGE, NONE};
use crate::exec::{arithmetic, bits, control, left_to_kvm, movement, string, system};
use crate::op::{FLAT, FS, GS, HIGH_BYTES, IMMEDIATE, MEMORY, Op, Run};
use crate::ram::PAGE;
use iced_x86::{
    Code, ConditionCode, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
};

/// The longest instruction (SDM vol. 2, 2.3.11).
pub(crate) const LONGEST: usize = 15;
/// Bytes that are looked at for one block.
pub(crate) const MOST_BYTES: usize = 256;
/// The opcode of HLT.
const HLT: u8 = 0xf4;
/// Instructions of one block.
const MOST_OPS: usize = 48;

/// Decodes instructions up to one that ends a block. False, and nothing decoded, if the first one, or whether an STI has
/// a HLT behind it, needs bytes that are not there.
pub(crate) fn block(rip: u64, bytes: &[u8], into: &mut Vec<Op>) -> bool {
    let mut decoder = Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE);
    let mut insn = Instruction::default();
    let first = into.len();
    while into.len() - first < MOST_OPS && decoder.can_decode() {
        let begun = decoder.position();
        decoder.decode_out(&mut insn);
        let cut = insn.is_invalid() && bytes.len() - begun < LONGEST;
        if cut || (insn.mnemonic() == Mnemonic::Sti && !decoder.can_decode()) {
            // It reaches beyond what was given: the next block, or one of its own across the page's end.
            return into.len() > first;
        }
        into.push(translate_before(&insn, bytes.get(decoder.position())));
        if ends_block(&insn) {
            break;
        }
    }
    true
}

/// Decodes the one instruction at `rip`.
pub(crate) fn one(rip: u64, bytes: &[u8], into: &mut Vec<Op>) {
    let mut insn = Instruction::default();
    let mut decoder = Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE);
    decoder.decode_out(&mut insn);
    into.push(translate_before(&insn, bytes.get(decoder.position())));
}

/// The op of an instruction with this byte behind it.
fn translate_before(insn: &Instruction, next: Option<&u8>) -> Op {
    let op = translate(insn);
    let sleeps = insn.mnemonic() == Mnemonic::Sti && next == Some(&HLT);
    if sleeps { Op { run: system::halt, ..op } } else { op }
}

/// Branches that are not taken go on in their block.
fn ends_block(insn: &Instruction) -> bool {
    !matches!(insn.flow_control(), FlowControl::Next | FlowControl::ConditionalBranch)
        || insn.mnemonic() == Mnemonic::Hlt
}

/// The op of an instruction, whatever it is.
fn translate(insn: &Instruction) -> Op {
    let mut op = Op {
        run: left_to_kvm,
        immediate: 0,
        disp: 0,
        offset: (insn.ip() as usize % PAGE) as u16,
        len: insn.len() as u8,
        bytes: 8,
        to: NONE,
        from: NONE,
        base: NONE,
        index: NONE,
        scale: 0,
        segment: FLAT,
        kind: 0,
        locked: insn.has_lock_prefix(),
    };
    if let Some(run) = set_up(insn, &mut op) {
        op.run = run;
    }
    op
}

fn set_up(insn: &Instruction, op: &mut Op) -> Option<Run> {
    if insn.is_invalid() {
        return None;
    }
    if let Some(run) = string_instruction(insn, op) {
        return run;
    }
    let has_memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    if has_memory {
        memory(insn, op)?;
    }
    op.bytes = operand_bytes(insn);
    let run = general(insn, op)
        .or_else(|| arithmetic_instruction(insn, op))
        .or_else(|| control_instruction(insn, op))
        .or_else(|| system_instruction(insn, op))?;
    Some(run)
}

/// Bytes of the first operand, which decide for most instructions.
fn operand_bytes(insn: &Instruction) -> u8 {
    match insn.op_kind(0) {
        OpKind::Register if insn.op_count() > 0 => insn.op0_register().size() as u8,
        OpKind::Memory => insn.memory_size().size() as u8,
        _ => 8,
    }
}

fn memory(insn: &Instruction, op: &mut Op) -> Option<()> {
    op.segment = match insn.memory_segment() {
        Register::FS => FS,
        Register::GS => GS,
        _ => FLAT,
    };
    if insn.is_ip_rel_memory_operand() {
        if insn.memory_base() != Register::RIP {
            return None;
        }
        op.base = CODE_PAGE;
        let page = insn.ip() & !(PAGE as u64 - 1);
        op.disp = i32::try_from(insn.ip_rel_memory_address().wrapping_sub(page) as i64).ok()?;
        return Some(());
    }
    op.disp = match i32::try_from(insn.memory_displacement64() as i64) {
        Ok(disp) => disp,
        // The accumulator's moves with a 64-bit address; they have no other immediate.
        Err(_) => return None,
    };
    op.base = base_register(insn.memory_base())?;
    op.index = base_register(insn.memory_index())?;
    op.scale = insn.memory_index_scale().ilog2() as u8;
    Some(())
}

fn base_register(register: Register) -> Option<u8> {
    match register {
        Register::None => Some(NONE),
        // Addresses of 32 bits are cut; compilers have no use for them here.
        r if r.is_gpr64() => Some(r.number() as u8),
        _ => None,
    }
}

/// A register, the memory operand or the immediate as one of an op's operands.
fn operand(insn: &Instruction, number: u32, op: &mut Op) -> Option<u8> {
    match insn.op_kind(number) {
        OpKind::Register => register(insn.op_register(number)),
        OpKind::Memory => Some(MEMORY),
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => {
            op.immediate = insn.immediate(number);
            Some(IMMEDIATE)
        }
        _ => None,
    }
}

fn register(register: Register) -> Option<u8> {
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => {
            Some(HIGH_BYTES + (register as u32 - Register::AH as u32) as u8)
        }
        r if r.is_gpr() => Some(r.full_register().number() as u8),
        _ => None,
    }
}

/// Fills in two operands.
fn both(insn: &Instruction, op: &mut Op) -> Option<()> {
    op.to = operand(insn, 0, op)?;
    op.from = operand(insn, 1, op)?;
    Some(())
}

fn general(insn: &Instruction, op: &mut Op) -> Option<Run> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Mov => return mov(insn, op),
        M::Movzx | M::Movsx | M::Movsxd => {
            both(insn, op)?;
            op.kind = source_bytes(insn);
            if insn.mnemonic() == M::Movzx { movement::zero_extended } else { movement::sign_extended }
        }
        M::Movnti => {
            both(insn, op)?;
            movement::mov
        }
        M::Lea => {
            op.to = operand(insn, 0, op)?;
            movement::address
        }
        M::Xchg => {
            both(insn, op)?;
            movement::exchange
        }
        M::Push => {
            op.from = operand(insn, 0, op)?;
            if stack_bytes(insn) != 8 {
                return None;
            }
            movement::push
        }
        M::Pop => {
            op.to = operand(insn, 0, op)?;
            if stack_bytes(insn) != 8 {
                return None;
            }
            movement::pop
        }
        M::Leave if insn.code() == Code::Leaveq => movement::leave,
        M::Bswap => {
            op.to = operand(insn, 0, op)?;
            if op.bytes < 4 {
                return None;
            }
            bits::swap
        }
        _ => return conditional(insn, op),
    })
}

fn source_bytes(insn: &Instruction) -> u8 {
    match insn.op_kind(1) {
        OpKind::Register => insn.op1_register().size() as u8,
        _ => insn.memory_size().size() as u8,
    }
}

/// Bytes that a push or a pop moves.
fn stack_bytes(insn: &Instruction) -> i32 {
    insn.stack_pointer_increment().abs()
}

fn mov(insn: &Instruction, op: &mut Op) -> Option<Run> {
    let (to, from) = (insn.op0_register(), insn.op1_register());
    if to.is_cr() {
        op.to = register(from)?;
        op.kind = 0x80 | to.number() as u8;
        return Some(system::control_register);
    }
    if from.is_cr() {
        op.to = register(to)?;
        op.kind = from.number() as u8;
        return Some(system::control_register);
    }
    if from.is_segment_register() && insn.op_kind(1) == OpKind::Register {
        op.to = operand(insn, 0, op)?;
        op.kind = from.number() as u8;
        return Some(system::read_segment);
    }
    if to == Register::SS && insn.op_kind(0) == OpKind::Register {
        op.from = operand(insn, 1, op)?;
        return Some(system::write_stack_segment);
    }
    both(insn, op)?;
    Some(match (op.to, op.from, op.bytes) {
        (0..=15, 0..=15, 8) => movement::mov_register,
        (0..=15, MEMORY, 8) => movement::load::<8>,
        (0..=15, MEMORY, 4) => movement::load::<4>,
        (MEMORY, 0..=15, 8) => movement::store::<8>,
        (MEMORY, 0..=15, 4) => movement::store::<4>,
        _ => movement::mov,
    })
}

/// A condition's number in the opcode.
fn condition(code: ConditionCode) -> Option<u8> {
    use ConditionCode as C;
    Some(match code {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
        _ => return None,
    })
}

fn conditional(insn: &Instruction, op: &mut Op) -> Option<Run> {
    op.kind = condition(insn.condition_code())?;
    if insn.is_jcc_short_or_near() {
        op.immediate = insn.near_branch_target();
        return Some(control::jump_if);
    }
    op.to = operand(insn, 0, op)?;
    match insn.op_count() {
        1 => Some(movement::set_if),
        2 => {
            op.from = operand(insn, 1, op)?;
            Some(movement::move_if)
        }
        // CMPccXADD has a condition too.
        _ => None,
    }
}

fn arithmetic_instruction(insn: &Instruction, op: &mut Op) -> Option<Run> {
    use Mnemonic as M;
    let run: Run = match insn.mnemonic() {
        M::Add => arithmetic::binary::<0>,
        M::Or => arithmetic::binary::<1>,
        M::Adc => arithmetic::binary::<2>,
        M::Sbb => arithmetic::binary::<3>,
        M::And => arithmetic::binary::<4>,
        M::Sub => arithmetic::binary::<5>,
        M::Xor => arithmetic::binary::<6>,
        M::Cmp => arithmetic::compare,
        M::Test => arithmetic::test,
        M::Cmpxchg => arithmetic::compare_exchange,
        M::Xadd => arithmetic::exchange_add,
        _ => return one_operand(insn, op),
    };
    both(insn, op)?;
    Some(run)
}

fn one_operand(insn: &Instruction, op: &mut Op) -> Option<Run> {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Inc | M::Dec | M::Neg | M::Not => {
            op.to = operand(insn, 0, op)?;
            op.kind = u8::from(insn.mnemonic() == M::Dec);
            Some(match insn.mnemonic() {
                M::Neg => arithmetic::negate,
                M::Not => arithmetic::invert,
                _ => arithmetic::step,
            })
        }
        M::Mul | M::Div | M::Idiv => {
            op.from = operand(insn, 0, op)?;
            op.kind = u8::from(insn.mnemonic() == M::Idiv);
            Some(if insn.mnemonic() == M::Mul { arithmetic::multiply } else { arithmetic::divide })
        }
        M::Imul if insn.op_count() == 1 => {
            op.from = operand(insn, 0, op)?;
            op.kind = 1;
            Some(arithmetic::multiply)
        }
        M::Imul => {
            both(insn, op)?;
            if insn.op_count() == 3 {
                operand(insn, 2, op)?;
                op.kind = 3;
            }
            Some(arithmetic::multiply_into)
        }
        _ => shifts(insn, op),
    }
}

fn shifts(insn: &Instruction, op: &mut Op) -> Option<Run> {
    use Mnemonic as M;
    let kind = match insn.mnemonic() {
        M::Rol => 0,
        M::Ror => 1,
        M::Rcl => 2,
        M::Rcr => 3,
        M::Shl | M::Sal => 4,
        M::Shr => 5,
        M::Sar => 7,
        M::Shld | M::Shrd => {
            both(insn, op)?;
            op.kind = if insn.mnemonic() == M::Shld { 0x80 } else { 0 };
            if insn.op_kind(2) == OpKind::Register {
                op.kind |= 0x40;
            } else {
                operand(insn, 2, op)?;
            }
            return Some(arithmetic::double_shift);
        }
        _ => return bit_instruction(insn, op),
    };
    both(insn, op)?;
    op.kind = kind;
    Some(arithmetic::shift)
}

fn bit_instruction(insn: &Instruction, op: &mut Op) -> Option<Run> {
    use Mnemonic as M;
    let (run, kind): (Run, u8) = match insn.mnemonic() {
        M::Bt => (bits::test, 0),
        M::Bts => (bits::test, 1),
        M::Btr => (bits::test, 2),
        M::Btc => (bits::test, 3),
        M::Bsf => (bits::scan, 0),
        M::Bsr => (bits::scan, 1),
        M::Popcnt => (bits::count, 0),
        M::Tzcnt => (bits::count, 1),
        M::Lzcnt => (bits::count, 2),
        M::Lahf => return Some(bits::flags_and_ah),
        M::Sahf => {
            op.kind = 1;
            return Some(bits::flags_and_ah);
        }
        M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo => return widening(insn, op),
        _ => return None,
    };
    both(insn, op)?;
    op.kind = kind;
    Some(run)
}

fn widening(insn: &Instruction, op: &mut Op) -> Option<Run> {
    use Mnemonic as M;
    op.bytes = match insn.mnemonic() {
        M::Cbw | M::Cwd => 2,
        M::Cwde | M::Cdq => 4,
        _ => 8,
    };
    Some(match insn.mnemonic() {
        M::Cbw | M::Cwde | M::Cdqe => arithmetic::widen,
        _ => arithmetic::spread_sign,
    })
}

fn control_instruction(insn: &Instruction, op: &mut Op) -> Option<Run> {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Jmp | M::Call => {
            let call = insn.mnemonic() == M::Call;
            if insn.is_jmp_short_or_near() || insn.is_call_near() {
                op.immediate = insn.near_branch_target();
                return Some(if call { control::call } else { control::jump });
            }
            if !insn.is_jmp_near_indirect() && !insn.is_call_near_indirect() || op.bytes != 8 {
                return None;
            }
            op.from = operand(insn, 0, op)?;
            Some(if call { control::call_to } else { control::jump_to })
        }
        M::Ret => match insn.code() {
            Code::Retnq => Some(control::ret),
            Code::Retnq_imm16 => {
                operand(insn, 0, op)?;
                Some(control::ret)
            }
            _ => None,
        },
        M::Jrcxz | M::Loopne | M::Loope | M::Loop => {
            op.kind = match insn.code() {
                Code::Jrcxz_rel8_64 => 0,
                Code::Loopne_rel8_64_RCX => 1,
                Code::Loope_rel8_64_RCX => 2,
                Code::Loop_rel8_64_RCX => 3,
                _ => return None,
            };
            op.immediate = insn.near_branch_target();
            Some(control::jump_by_count)
        }
        _ => None,
    }
}

fn system_instruction(insn: &Instruction, op: &mut Op) -> Option<Run> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Nop | M::Reservednop | M::Pause | M::Endbr64 | M::Endbr32 => system::nothing,
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchw => system::nothing,
        M::Lfence | M::Mfence | M::Sfence => system::fence,
        M::Clc | M::Stc | M::Cmc | M::Cld | M::Std => {
            op.kind = match insn.mnemonic() {
                M::Clc => 0,
                M::Stc => 0x20,
                M::Cmc => 0x40,
                M::Cld => 10,
                _ => 10 | 0x20,
            };
            arithmetic::flag
        }
        M::Cli | M::Sti => {
            op.kind = u8::from(insn.mnemonic() == M::Sti);
            system::interrupts
        }
        M::Clac | M::Stac => {
            op.kind = u8::from(insn.mnemonic() == M::Stac);
            system::user_access
        }
        M::Hlt => system::halt,
        M::Pushfq => system::push_flags,
        M::Popfq => system::pop_flags,
        M::Rdtsc => system::read_tsc,
        M::Rdmsr => system::read_msr,
        M::Wrmsr => system::write_msr,
        M::Swapgs => system::swap_gs,
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => {
            op.to = operand(insn, 0, op)?;
            op.kind = match insn.mnemonic() {
                M::Rdfsbase => 0,
                M::Rdgsbase => 1,
                M::Wrfsbase => 2,
                _ => 3,
            };
            system::segment_base
        }
        M::Invlpg => system::invalidate_page,
        M::Int3 => system::breakpoint,
        M::Ud2 => system::undefined,
        M::Iretq => system::interrupt_return,
        M::Sysretq => system::system_return,
        M::Out => return out(insn, op),
        _ => return None,
    })
}

fn out(insn: &Instruction, op: &mut Op) -> Option<Run> {
    match insn.code() {
        Code::Out_imm8_AL if insn.immediate8() == crate::TRAP_PORT => op.kind = 1,
        Code::Out_DX_EAX => op.bytes = 4,
        _ => return None,
    }
    Some(system::out)
}

/// String instructions; the inner `None` is one that is KVM's.
fn string_instruction(insn: &Instruction, op: &mut Op) -> Option<Option<Run>> {
    let (run, bytes): (Run, u8) = match insn.code() {
        Code::Movsb_m8_m8 => (string::movs, 1),
        Code::Movsw_m16_m16 => (string::movs, 2),
        Code::Movsd_m32_m32 => (string::movs, 4),
        Code::Movsq_m64_m64 => (string::movs, 8),
        Code::Stosb_m8_AL => (string::stos, 1),
        Code::Stosw_m16_AX => (string::stos, 2),
        Code::Stosd_m32_EAX => (string::stos, 4),
        Code::Stosq_m64_RAX => (string::stos, 8),
        Code::Lodsb_AL_m8 => (string::lods, 1),
        Code::Lodsw_AX_m16 => (string::lods, 2),
        Code::Lodsd_EAX_m32 => (string::lods, 4),
        Code::Lodsq_RAX_m64 => (string::lods, 8),
        Code::Scasb_AL_m8 => (string::compare, 1),
        Code::Scasw_AX_m16 => (string::compare, 2),
        Code::Scasd_EAX_m32 => (string::compare, 4),
        Code::Scasq_RAX_m64 => (string::compare, 8),
        Code::Cmpsb_m8_m8 => (string::compare, 1),
        Code::Cmpsw_m16_m16 => (string::compare, 2),
        Code::Cmpsd_m32_m32 => (string::compare, 4),
        Code::Cmpsq_m64_m64 => (string::compare, 8),
        _ => return None,
    };
    op.bytes = bytes;
    if insn.has_rep_prefix() || insn.has_repe_prefix() {
        op.kind = string::REP;
    } else if insn.has_repne_prefix() {
        op.kind = string::REPNE;
    }
    if matches!(insn.mnemonic(), Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq) {
        op.kind |= 0x80;
    }
    // Addresses of 32 bits.
    let wide = |kind| {
        !matches!(kind, OpKind::MemoryESEDI | OpKind::MemorySegESI | OpKind::MemoryESDI | OpKind::MemorySegSI)
    };
    if !(0..insn.op_count()).all(|i| wide(insn.op_kind(i))) {
        return Some(None);
    }
    op.segment = match insn.memory_segment() {
        Register::FS => FS,
        Register::GS => GS,
        _ => FLAT,
    };
    Some(Some(run))
}
