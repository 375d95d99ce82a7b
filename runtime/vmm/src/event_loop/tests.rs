//! The whole of it: bus, loop thread, devices; the test is guest and vCPU.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

use super::{Bus, LoopHandle, idle, start};
use crate::devices::mmio::{F_EVENT_IDX, F_VERSION_1, State, register as reg, status};
use crate::devices::testing::{BUFFERS, DriverQueue, Piece, memory, readable, writable};
use crate::devices::vsock::{GUEST_CID, HEADER_BYTES, HOST_CID, Header, STREAM, op};
use crate::devices::{DeviceError, DevicesConfig, Disk, GuestMemory, Interrupt};

/// Long enough for any machine; reached only when something is broken.
const PATIENCE: Duration = Duration::from_secs(30);
const BASE: u64 = 0xd000_0000;
const DISK_BYTES: usize = 4 << 20;

/// Interrupts as messages.
struct Wire(Mutex<Sender<u32>>);

impl Interrupt for Wire {
    fn raise(&self, gsi: u32) {
        // Late interrupts after the test's end interest nobody.
        let _ = self.0.lock().unwrap().send(gsi);
    }
}

struct Machine {
    mem: Arc<GuestMemory>,
    bus: Arc<Bus>,
    handle: LoopHandle,
    interrupts: Mutex<Receiver<u32>>,
}

fn content() -> Vec<u8> {
    (0..DISK_BYTES).map(|at| (at / 4096) as u8 ^ at as u8).collect()
}

fn disk(read_only: bool) -> Disk {
    let mut file: File = TempFile::new().unwrap().into_file();
    file.write_all(&content()).unwrap();
    Disk { file, read_only, id: "test".into() }
}

impl Machine {
    fn new(disks: Vec<Disk>) -> Self {
        Self::restored(disks, Vec::new(), memory())
    }

    fn restored(disks: Vec<Disk>, states: Vec<State>, mem: Arc<GuestMemory>) -> Self {
        let (sender, interrupts) = channel();
        let config = DevicesConfig { disks, states, ..DevicesConfig::default() };
        let wire = Arc::new(Wire(Mutex::new(sender)));
        let (bus, handle) = start(idle().unwrap(), config, GuestMemory::clone(&mem), wire).unwrap();
        Self { mem, bus, handle, interrupts: Mutex::new(interrupts) }
    }

    fn write(&self, device: u64, register: u64, value: u32) {
        assert!(self.bus.write(BASE + device * 0x1000 + register, &value.to_le_bytes()));
    }

    fn read(&self, device: u64, register: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.bus.read(BASE + device * 0x1000 + register, &mut data));
        u32::from_le_bytes(data)
    }

    /// What Linux does at probe, with rings that no other device has.
    fn bring_up(&self, device: u64, sizes: &[u16]) -> Vec<DriverQueue> {
        let ok = [status::ACKNOWLEDGE, status::DRIVER, status::FEATURES_OK, status::DRIVER_OK];
        self.write(device, reg::STATUS, 0);
        self.write(device, reg::STATUS, ok[0] | ok[1]);
        let features = F_VERSION_1 | F_EVENT_IDX;
        for half in [1, 0] {
            self.write(device, reg::DRIVER_FEATURES_SEL, half);
            self.write(device, reg::DRIVER_FEATURES, (features >> (half * 32)) as u32);
        }
        self.write(device, reg::STATUS, ok[0] | ok[1] | ok[2]);
        let queues = sizes.iter().enumerate().map(|(index, &size)| {
            let queue = DriverQueue::new(&self.mem, device as usize * 4 + index, size);
            self.write(device, reg::QUEUE_SEL, index as u32);
            self.write(device, reg::QUEUE_SIZE, size.into());
            self.write(device, reg::QUEUE_DESC_LOW, queue.base as u32);
            self.write(device, reg::QUEUE_DRIVER_LOW, queue.avail() as u32);
            self.write(device, reg::QUEUE_DEVICE_LOW, queue.used() as u32);
            self.write(device, reg::QUEUE_READY, 1);
            queue
        });
        let queues = queues.collect();
        self.write(device, reg::STATUS, 15);
        assert_eq!(self.read(device, reg::STATUS), 15);
        queues
    }

    /// Waits for the device's interrupt and acknowledges it.
    fn interrupted(&self, device: u64) {
        let interrupts = self.interrupts.lock().unwrap();
        while interrupts.recv_timeout(PATIENCE).unwrap() != 5 + device as u32 {}
        let bits = self.read(device, reg::INTERRUPT_STATUS);
        self.write(device, reg::INTERRUPT_ACK, bits);
    }

    fn header(&self, at: u64, kind: u32, sector: u64) {
        self.mem.write_obj(kind, GuestAddress(at)).unwrap();
        self.mem.write_obj(sector, GuestAddress(at + 8)).unwrap();
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

const DATA: u64 = BUFFERS + 0x1_0000;

fn block_request(data: Piece) -> [Piece; 3] {
    [readable(BUFFERS, 16), data, writable(BUFFERS + 0x800, 1)]
}

/// A guest whose vsock driver sends one packet at a time.
struct VsockGuest<'a> {
    machine: &'a Machine,
    device: u64,
    queues: Vec<DriverQueue>,
}

impl<'a> VsockGuest<'a> {
    fn new(machine: &'a Machine, device: u64) -> Self {
        let mut queues = machine.bring_up(device, &[16, 128, 8]);
        for buffer in 0..8 {
            queues[0].add(&[writable(DATA + buffer * 0x1000, 4096)]);
        }
        machine.write(device, reg::QUEUE_NOTIFY, 0);
        Self { machine, device, queues }
    }

    fn send(&mut self, op: u16, host_port: u32, payload: &[u8]) {
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: 9,
            dst_port: host_port,
            len: payload.len() as u32,
            kind: STREAM,
            op,
            buf_alloc: 1 << 20,
            ..Header::default()
        };
        self.machine.mem.write_slice(&header.to_bytes(), GuestAddress(BUFFERS)).unwrap();
        self.machine.mem.write_slice(payload, GuestAddress(BUFFERS + 64)).unwrap();
        self.queues[1].add(&[readable(BUFFERS, HEADER_BYTES), readable(BUFFERS + 64, payload.len())]);
        self.machine.write(self.device, reg::QUEUE_NOTIFY, 1);
    }

    /// The next packet; buffers are used in the order they were posted, each once.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        loop {
            let seen = self.queues[0].used_seen;
            self.queues[0].set_used_event(seen);
            let used = self.queues[0].take_used();
            if let [(head, len)] = used[..] {
                let bytes = self.machine.bytes(DATA + u64::from(head) * 0x1000, len as usize);
                let header = Header::from_bytes(bytes[..HEADER_BYTES].try_into().unwrap());
                return (header, bytes[HEADER_BYTES..].to_vec());
            }
            assert_eq!(used, []);
            self.machine.interrupted(self.device);
        }
    }
}

#[test]
fn the_kernel_is_told_where_the_devices_are() {
    let machine = Machine::new(vec![disk(true)]);
    let expected = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 \
                    virtio_mmio.device=4K@0xd0002000:7";
    assert_eq!(machine.bus.kernel_cmdline(), expected);
    let types = [0, 1, 2].map(|device| machine.read(device, reg::DEVICE_ID));
    assert_eq!(types, [2, 19, 4], "disk, vsock, entropy");
}

#[test]
fn addresses_of_no_device_are_not_claimed() {
    let machine = Machine::new(Vec::new());
    for addr in [0, BASE - 4, BASE + 0x2000, u64::MAX] {
        let mut data = [7; 4];
        assert!(!machine.bus.read(addr, &mut data));
        assert_eq!(data, [7; 4]);
        assert!(!machine.bus.write(addr, &data));
    }
}

#[test]
fn more_disks_than_there_are_lines_are_refused() {
    let disks = (0..14).map(|_| disk(true)).collect();
    let (sender, _interrupts) = channel();
    let wire = Arc::new(Wire(Mutex::new(sender)));
    let config = DevicesConfig { disks, ..DevicesConfig::default() };
    let refused = start(idle().unwrap(), config, GuestMemory::clone(&memory()), wire).err();
    assert!(matches!(refused, Some(DeviceError::TooManyDisks { count: 14, most: 13 })));
}

#[test]
fn a_guest_reads_and_writes_its_disk() {
    let machine = Machine::new(vec![disk(false)]);
    let mut queues = machine.bring_up(0, &[128]);
    machine.header(BUFFERS, 0, 8);
    queues[0].add(&block_request(writable(DATA, 8192)));
    machine.write(0, reg::QUEUE_NOTIFY, 0);
    machine.interrupted(0);
    assert_eq!(queues[0].take_used(), [(0, 8193)]);
    assert_eq!(machine.bytes(DATA, 8192), content()[4096..12288]);
    // A write goes through the ring, whatever the file system.
    machine.header(BUFFERS, 1, 0);
    queues[0].set_used_event(1);
    queues[0].add(&block_request(readable(DATA, 4096)));
    machine.write(0, reg::QUEUE_NOTIFY, 0);
    machine.interrupted(0);
    assert_eq!(queues[0].take_used(), [(3, 1)]);
    machine.header(BUFFERS, 0, 0);
    queues[0].set_used_event(2);
    queues[0].add(&block_request(writable(DATA + 0x8000, 4096)));
    machine.write(0, reg::QUEUE_NOTIFY, 0);
    machine.interrupted(0);
    assert_eq!(machine.bytes(DATA + 0x8000, 4096), content()[4096..8192]);
    let stats = machine.handle.stats();
    assert_eq!((stats.notifications, stats.block_requests, stats.interrupts), (3, 3, 3));
    assert_eq!((stats.block_read_bytes, stats.block_written_bytes), (12288, 4096));
}

#[test]
fn a_guest_connects_to_a_listening_host() {
    let machine = Machine::new(Vec::new());
    let listener = machine.handle.listen(1024).unwrap();
    let mut guest = VsockGuest::new(&machine, 0);
    guest.send(op::REQUEST, 1024, b"");
    let mut stream = listener.recv_timeout(PATIENCE).unwrap();
    assert_eq!(guest.receive().0.op, op::RESPONSE);
    stream.write_all(b"to the guest").unwrap();
    assert_eq!(guest.receive().1, b"to the guest");
    guest.send(op::RW, 1024, b"to the host");
    let mut bytes = [0; 11];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to the host");
    drop(stream);
    let (header, _) = guest.receive();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, 3));
}

#[test]
fn a_host_connects_to_a_guest_that_comes_later() {
    let machine = Machine::new(Vec::new());
    std::thread::scope(|scope| {
        let connecting = scope.spawn(|| machine.handle.connect(1, PATIENCE));
        let mut guest = VsockGuest::new(&machine, 0);
        let (request, _) = guest.receive();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, 1));
        let mut response = Header { op: op::RESPONSE, src_port: 1, ..Header::default() };
        response = Header { dst_port: request.src_port, src_cid: GUEST_CID, dst_cid: HOST_CID, ..response };
        response = Header { kind: STREAM, buf_alloc: 65536, ..response };
        machine.mem.write_slice(&response.to_bytes(), GuestAddress(BUFFERS)).unwrap();
        guest.queues[1].add(&[readable(BUFFERS, HEADER_BYTES)]);
        machine.write(0, reg::QUEUE_NOTIFY, 1);
        connecting.join().unwrap().unwrap();
    });
}

#[test]
fn a_connection_the_guest_never_answers_times_out() {
    let machine = Machine::new(Vec::new());
    let outcome = machine.handle.connect(1, Duration::from_millis(10));
    assert_eq!(outcome.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
}

#[test]
fn a_stopped_loop_answers_no_command_and_leaves_the_bus_harmless() {
    let machine = Machine::new(vec![disk(false)]);
    let mut queues = machine.bring_up(0, &[128]);
    machine.handle.stop();
    machine.handle.join();
    assert_eq!(machine.handle.listen(1).unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    assert!(machine.handle.connect(1, PATIENCE).is_err());
    assert!(matches!(machine.handle.pause(), Err(DeviceError::Stopped)));
    machine.header(BUFFERS, 1, 0);
    queues[0].add(&block_request(readable(DATA, 512)));
    machine.write(0, reg::QUEUE_NOTIFY, 0);
    machine.write(0, reg::STATUS, 0);
}

#[test]
fn dropping_the_handle_waits_for_writes_in_flight() {
    for _ in 0..20 {
        let backing = disk(false);
        let file = backing.file.try_clone().unwrap();
        let machine = Machine::new(vec![backing]);
        let mut queues = machine.bring_up(0, &[128]);
        machine.mem.write_slice(&[0xab; 0x8_0000], GuestAddress(DATA)).unwrap();
        machine.header(BUFFERS, 1, 0);
        queues[0].add(&block_request(readable(DATA, 0x8_0000)));
        machine.write(0, reg::QUEUE_NOTIFY, 0);
        let Machine { mem, handle, .. } = machine;
        drop(handle);
        // If the request was seen at all, it is over now: the memory may change freely.
        mem.write_slice(&[0xcd; 0x8_0000], GuestAddress(DATA)).unwrap();
        let mut bytes = vec![0; 0x8_0000];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        assert!(!bytes.contains(&0xcd) || bytes == content()[..0x8_0000]);
    }
}

#[test]
fn a_reset_under_load_is_complete_when_the_write_returns() {
    let machine = Machine::new(vec![disk(false)]);
    for _ in 0..50 {
        let mut queues = machine.bring_up(0, &[128]);
        // The rings as a driver clears them.
        queues[0].set_available(0);
        machine.mem.write_obj(0u16, GuestAddress(queues[0].used() + 2)).unwrap();
        machine.header(BUFFERS, 1, 0);
        for _ in 0..20 {
            queues[0].add(&block_request(readable(DATA, 4096)));
        }
        machine.write(0, reg::QUEUE_NOTIFY, 0);
        machine.write(0, reg::STATUS, 0);
        assert_eq!(machine.read(0, reg::STATUS), 0);
        let before = queues[0].take_used().len();
        assert!(before <= 20);
        assert_eq!(machine.read(0, reg::INTERRUPT_STATUS), 0);
    }
}

#[test]
fn a_paused_machine_can_be_restored_from_its_states_and_memory() {
    let backing = disk(false);
    let file = backing.file.try_clone().unwrap();
    let machine = Machine::new(vec![backing]);
    let mut queues = machine.bring_up(0, &[128]);
    machine.header(BUFFERS, 1, 100);
    queues[0].add(&block_request(readable(DATA, 4096)));
    machine.write(0, reg::QUEUE_NOTIFY, 0);
    let paused = machine.handle.pause().unwrap();
    let states = paused.states().to_vec();
    assert_eq!(states.len(), 3);
    assert_eq!(queues[0].take_used().len(), 1, "nothing is left in flight");
    drop(paused);
    // A doorbell that the old machine never heard.
    machine.header(BUFFERS, 0, 0);
    queues[0].set_used_event(1);
    let head = queues[0].add(&block_request(writable(DATA, 4096)));
    let disk = Disk { file, read_only: false, id: "test".into() };
    let restored = Machine::restored(vec![disk], states.clone(), Arc::clone(&machine.mem));
    while restored.read(0, reg::INTERRUPT_STATUS) == 1 && queues[0].take_used() != [(head, 4097)] {
        std::thread::yield_now();
    }
    assert_eq!(restored.bytes(DATA, 4096), content()[..4096]);
    assert_eq!(restored.read(0, reg::STATUS), states[0].status);
}

#[test]
fn states_of_another_machine_are_refused() {
    let states = Machine::new(Vec::new()).handle.pause().unwrap().states().to_vec();
    let (sender, _interrupts) = channel();
    let wire = Arc::new(Wire(Mutex::new(sender)));
    let config = DevicesConfig { disks: vec![disk(true)], states, ..DevicesConfig::default() };
    let refused = start(idle().unwrap(), config, GuestMemory::clone(&memory()), wire).err();
    assert!(matches!(refused, Some(DeviceError::StateCount { states: 2, devices: 3 })));
}

#[test]
fn two_vcpus_with_a_disk_each_lose_no_request() {
    let machine = Machine::new(vec![disk(false), disk(true)]);
    let content = content();
    let (disk0, disk1) = (machine.bring_up(0, &[128]), machine.bring_up(1, &[128]));
    std::thread::scope(|scope| {
        for (device, mut queues) in [(0u64, disk0), (1, disk1)] {
            let (machine, content) = (&machine, &content);
            scope.spawn(move || {
                let area = BUFFERS + device * 0x10_0000;
                for round in 0..500u64 {
                    let sector = round * 37 % 4096;
                    let addr = area + 0x1_0000 + round % 16 * 0x1000;
                    machine.header(area, 0, sector);
                    let head =
                        queues[0].add(&[readable(area, 16), writable(addr, 4096), writable(area + 0x800, 1)]);
                    queues[0].set_used_event(queues[0].used_seen);
                    machine.write(device, reg::QUEUE_NOTIFY, 0);
                    while queues[0].take_used() != [(head, 4097)] {
                        std::thread::yield_now();
                    }
                    machine.write(device, reg::INTERRUPT_ACK, 1);
                    let from = sector as usize * 512;
                    assert_eq!(machine.bytes(addr, 4096), content[from..from + 4096]);
                }
            });
        }
    });
    assert_eq!(machine.handle.stats().block_requests, 1000);
}
