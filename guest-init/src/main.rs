//! PID 1 of a microVM: mounts, connects to the host, runs what the host asks for, reaps.
//!
//! One thread, one epoll, no allocation while it runs, no waiting anywhere else, no polling; it is the
//! only caller of wait. `unsafe` is in `sys` only.
//!
//! ```text
//! guest-init                                   as PID 1: boot, connect by vsock, serve for ever
//! guest-init --tool VERB ARGUMENT              a command of a sandbox: files and ports, see tool.rs
//! guest-init --serve-fd N [--listen-fd M]      for tests: no mounts; serve the connected socket N, then
//!                                              those accepted on M; ends when there is neither
//! ```
#![cfg_attr(all(feature = "freestanding", not(test)), no_std)]
#![cfg_attr(not(test), no_main)]
// In a test build nothing enters the agent.
#![cfg_attr(test, allow(dead_code))]

mod agent;
mod boot;
mod exec;
mod ids;
mod outbox;
mod ring;
mod stream;
mod sys;
mod text;
mod tool;

use core::ffi::CStr;

use agent::{Agent, Memory, Role};
use guest_init::AGENT_PORT;
use ids::Ids;
use sys::{Arguments, Errno, Fd, Gate, Socket, TakeOnce};
use text::Text;

/// All the memory the agent will ever use besides its stack; zero, so it is not in the file.
static MEMORY: TakeOnce<Memory> = TakeOnce::new(Memory::ZERO);

/// Where both ways of starting lead.
fn enter(arguments: Arguments) -> ! {
    let mut words = arguments;
    if words.next().is_some_and(|word| word.to_bytes() == b"--tool") {
        tool::run(words);
    }
    let entered_ns = sys::boottime_ns();
    let Some(memory) = MEMORY.take() else { fail("entered twice", None) };
    match hosted(arguments) {
        Some((connection, listener)) => {
            sys::become_subreaper();
            if let Err(errno) = sys::enter(c"/") {
                fail("enter /", Some(errno));
            }
            let patient = false;
            let mut agent = start(memory, Role::Hosted, entered_ns, patient, None, None);
            agent.connected(connection);
            if let Some(listener) = listener {
                agent.listen_on(listener);
            }
            agent.serve()
        }
        None => {
            let booted = match boot::boot() {
                Ok(booted) => booted,
                Err(failed) => fail(failed.step, Some(failed.errno)),
            };
            let gate = Gate::open().ok();
            let mut agent = start(memory, Role::Init, entered_ns, booted.patient, gate, Some(booted.ids));
            // The host listens before it starts us. If it is gone, later connections are what is left.
            if let Ok(socket) = Socket::connect(AGENT_PORT) {
                agent.connected(socket);
            }
            // Off the way to the first command: Hello is sent already.
            match Socket::listen(AGENT_PORT) {
                Ok(listener) => agent.listen_on(listener),
                Err(errno) => fail(
                    "listen on vsock; does the kernel have virtio-vsock, and the VM the device?",
                    Some(errno),
                ),
            }
            agent.serve()
        }
    }
}

fn start(
    memory: &'static mut Memory,
    role: Role,
    entered_ns: u64,
    patient: bool,
    gate: Option<Gate>,
    ids: Option<Ids>,
) -> Agent<'static> {
    match Agent::new(memory, role, entered_ns, patient, gate, ids) {
        Ok(agent) => agent,
        Err(errno) => fail("make the event loop", Some(errno)),
    }
}

/// The sockets that a test has passed in.
fn hosted(mut arguments: Arguments) -> Option<(Socket, Option<Fd>)> {
    let mut connection = None;
    let mut listener = None;
    while let Some(option) = arguments.next() {
        // The kernel passes words of its command line that it does not know; they are not for us.
        match option.to_bytes() {
            b"--serve-fd" => connection = Some(Socket::from_fd(descriptor(arguments.next()))),
            b"--listen-fd" => listener = Some(descriptor(arguments.next())),
            _ => {}
        }
    }
    connection.map(|connection| (connection, listener))
}

fn descriptor(number: Option<&CStr>) -> Fd {
    let number = number.and_then(|text| text.to_str().ok()?.parse().ok());
    let Some(Ok(fd)) = number.map(Fd::inherited) else { fail("use the given file descriptor", None) };
    fd
}

/// Says what could not be done and ends; as PID 1 that is a kernel panic, which the VMM sees.
fn fail(step: &str, errno: Option<Errno>) -> ! {
    let mut text = Text::new();
    text.add(format_args!("guest-init: cannot {step}"));
    if let Some(Errno(number)) = errno {
        text.add(format_args!(" (errno {number})"));
    }
    text.add(format_args!("\n"));
    sys::report_fatal(text.bytes());
    sys::exit(1)
}
