//! Code that was decoded for another engine: believed where it is what it was, and only there.

use super::guest::{DIRECT, Guest, RAM_BYTES};
use super::random::Random;
use crate::book::{Code, CodeBook};
use crate::cpu::{RAX, RCX, RDX};
use crate::stop::Stop;
use std::sync::Arc;

/// again: inc eax; dec ecx; jnz again; hlt behind it
const COUNTS: &[u8] = &[0xff, 0xc0, 0xff, 0xc9, 0x75, 0xfa];

/// In EAX.
const MINUS_5: u64 = 0xffff_fffb;

fn book_of(code: &[Code]) -> Arc<CodeBook> {
    let mut book = CodeBook::default();
    book.learn(code);
    Arc::new(book)
}

/// A guest with `book` that has run `code`, where that is, and RAX then.
fn counted(book: &Arc<CodeBook>, code: &[u8]) -> (Guest, u64, u64) {
    let mut guest = Guest::with_book(Arc::clone(book));
    let at = guest.code(code);
    guest.set_reg(RAX, 0);
    guest.set_reg(RCX, 5);
    assert_eq!(guest.run_at(at), Stop::Halt);
    let rax = guest.reg(RAX);
    (guest, at, rax)
}

#[test]
fn what_another_engine_has_decoded_is_not_decoded_again() {
    let (mut first, _, rax) = counted(&Arc::default(), COUNTS);
    let code = first.engine.code();
    assert_eq!(rax, 5);
    assert!(!code.is_empty());
    let (mut second, _, rax) = counted(&book_of(&code), COUNTS);
    assert_eq!(rax, 5);
    assert_eq!(second.engine.code(), [], "decoded though the book has it");
}

#[test]
fn other_bytes_at_an_address_that_is_known_are_done_as_they_are() {
    let (mut first, _, _) = counted(&Arc::default(), COUNTS);
    let book = book_of(&first.engine.code());
    // dec eax for inc eax; the rest as it was.
    let mut other = COUNTS.to_vec();
    other[1] = 0xc8;
    let (_, _, rax) = counted(&book, &other);
    assert_eq!(rax, MINUS_5);
}

#[test]
fn code_of_the_book_that_a_guest_changes_is_done_as_it_is_now() {
    let (mut first, at, _) = counted(&Arc::default(), COUNTS);
    let book = book_of(&first.engine.code());
    let (mut guest, here, _) = counted(&book, COUNTS);
    assert_eq!(here, at);
    // mov byte [rdx], 0xc8
    let writes = guest.code(&[0xc6, 0x02, 0xc8]);
    guest.set_reg(RDX, at + 1);
    assert_eq!(guest.run_at(writes), Stop::Halt);
    guest.set_reg(RAX, 0);
    guest.set_reg(RCX, 5);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.reg(RAX), MINUS_5);
}

#[test]
fn a_book_of_anything_changes_nothing_that_a_guest_does() {
    let (mut random, mut ended) = (Random::new(29), 0);
    for _ in 0..300 {
        let code: Vec<u8> = (0..40).map(|_| random.next() as u8).collect();
        let place = Guest::new().code(&code);
        let mut listed = Vec::new();
        for _ in 0..40 {
            let rip = place + random.below(48);
            let from = (rip - place) as usize;
            // Most of them what is there, some cut, some wrong.
            let mut bytes = code.get(from..).unwrap_or_default().to_vec();
            bytes.truncate(random.below(1 + bytes.len() as u64) as usize);
            if random.once_in(4) {
                bytes.extend((0..random.below(400)).map(|_| 0x90));
            }
            let rip = if random.once_in(8) { random.value() } else { rip };
            listed.push(Code { rip, bytes });
        }
        let book = book_of(&listed);
        let end = |book: &Arc<CodeBook>| {
            let mut guest = Guest::with_book(Arc::clone(book));
            let at = guest.code(&code);
            for register in 0..16 {
                // Pointers, so that some of it goes on for a while.
                guest.set_reg(register, DIRECT + RAM_BYTES / 2 + 64 * register as u64);
            }
            let stop = guest.run_at(at);
            let mut memory = vec![0; RAM_BYTES as usize];
            guest.read_bytes(0, &mut memory);
            (stop, guest.rip(), guest.registers(), memory)
        };
        let (known, found) = (end(&book), end(&Arc::default()));
        // A run ends with a block, and blocks are as long as the book has them.
        if known.0 != Stop::Fuel {
            ended += 1;
            assert!(known == found, "{code:x?}, {book:?}: {:?} {:?}", known.0, found.0);
        }
    }
    assert!(ended > 200, "{ended} of 300 came to an end");
}
