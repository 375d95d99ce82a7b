//! The virtio devices behind their transport, with any registers, rings, chains and requests.
//!
//! Promises: no panic, nothing outside RAM touched (guard pages; the kernel says EFAULT for what it is
//! handed), a turn of work always comes to an end, and after a reset nothing is in flight.

use crate::guarded;
use arbitrary::{Result, Unstructured};
use peregrine_vmm::devices::block::Block;
use peregrine_vmm::devices::entropy::Entropy;
use peregrine_vmm::devices::mmio::{Device, Done, Effect, Line, Mmio, State, Wiring, register, status};
use peregrine_vmm::devices::virtqueue::Turn;
use peregrine_vmm::devices::vsock::{GUEST_CID, HOST_CID, Header, STREAM, Vsock};
use peregrine_vmm::devices::{Counters, Disk, Interrupt};
use peregrine_vmm::event_loop::ring::Op;
use peregrine_vmm::memory::GuestMemory;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use vm_memory::{Bytes as _, GuestAddress};

const RAM: [(u64, usize); 2] = [(0, 0x1_0000), (0x2_0000, 0x1_0000)];
/// Rings of queue `n` stand 8 KiB apart from 0; buffers from here.
const BUFFERS: u64 = 0x8000;
const DISK_BYTES: u64 = 64 << 10;
/// More turns than any full ring needs.
const MOST_TURNS: u32 = 1000;
const PORT: u32 = 1024;

thread_local! {
    static MEM: Arc<GuestMemory> = Arc::new(guarded::memory(&RAM));
}

static DISK: LazyLock<File> = LazyLock::new(|| {
    let mut file = tempfile::tempfile().unwrap_or_else(|e| panic!("disk: {e}"));
    file.write_all(&vec![0x5a; DISK_BYTES as usize]).unwrap_or_else(|e| panic!("disk: {e}"));
    file
});

struct Nobody;

impl Interrupt for Nobody {
    fn raise(&self, _: u32) {}
}

/// A block device, read-only or not.
pub fn block(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let mode: u8 = u.arbitrary().unwrap_or(0);
    let file = DISK.try_clone().unwrap_or_else(|e| panic!("disk: {e}"));
    let disk = Disk { file, read_only: mode & 1 == 1, id: "fuzz".to_owned() };
    let mut device = Block::new(disk).unwrap_or_else(|e| panic!("{e}"));
    device.set_read_cached(mode & 2 == 0);
    let _ = Driver::new(device, &[]).and_then(|mut driver| driver.execute(&mut u, block_request));
}

/// A socket device with a listener, whose streams the host reads and writes.
pub fn vsock(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let mut device = if u.arbitrary().unwrap_or(false) {
        Vsock::restored(&State::default()).map_or_else(|_| Vsock::default(), |(vsock, _)| vsock)
    } else {
        Vsock::default()
    };
    let accepted = device.listen(PORT).unwrap_or_else(|e| panic!("{e}"));
    let _ = Driver::new(device, &[0]).and_then(|mut driver| {
        driver.host = Box::new(move |u, streams: &mut Vec<UnixStream>| {
            streams.extend(accepted.try_iter());
            host_uses_streams(u, streams)
        });
        driver.execute(&mut u, vsock_packet)
    });
}

/// The source of random bytes.
pub fn entropy(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let _ = Driver::new(Entropy, &[0]).and_then(|mut driver| driver.execute(&mut u, |_| Ok(Vec::new())));
}

fn block_request(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let kind: u32 = *u.choose(&[0, 0, 1, 1, 4, 8, 11, 13, 99])?;
    let sector = if u.ratio(1, 8)? { u.arbitrary()? } else { u.int_in_range(0..=DISK_BYTES / 512 + 1)? };
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&0_u32.to_le_bytes());
    bytes.extend_from_slice(&sector.to_le_bytes());
    // What follows a discard's header: sector, count, flags.
    bytes.extend_from_slice(&u.int_in_range(0..=200_u64)?.to_le_bytes());
    bytes.extend_from_slice(&u.arbitrary::<u32>()?.to_le_bytes());
    bytes.extend_from_slice(&u.int_in_range(0..=2_u32)?.to_le_bytes());
    Ok(bytes)
}

fn vsock_packet(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let right = u.ratio(15, 16)?;
    let header = Header {
        src_cid: if right { GUEST_CID } else { u.arbitrary()? },
        dst_cid: HOST_CID,
        src_port: u.int_in_range(1..=3)?,
        dst_port: if right { PORT } else { u.arbitrary()? },
        len: *u.choose(&[0, 0, 1, 64, 1000, 4096, u32::MAX])?,
        kind: if right { STREAM } else { u.arbitrary()? },
        op: u.int_in_range(0..=9)?,
        flags: u.int_in_range(0..=3)?,
        buf_alloc: *u.choose(&[0, 10, 4096, 262_144, u32::MAX])?,
        fwd_cnt: if right { 0 } else { u.arbitrary()? },
    };
    Ok(header.to_bytes().to_vec())
}

fn host_uses_streams(u: &mut Unstructured<'_>, streams: &mut Vec<UnixStream>) -> Result<()> {
    let Some(index) = streams.len().checked_sub(1) else {
        return Ok(());
    };
    let stream = &mut streams[index];
    // A stream that the guest has closed gives errors; they are none of ours.
    let _ = stream.set_nonblocking(true);
    let mut bytes = [7; 5000];
    match u.int_in_range(0..=3)? {
        0 => drop(streams.pop()),
        1 => drop(stream.read(&mut bytes)),
        _ => drop(stream.write(&bytes[..u.int_in_range(0..=5000)?])),
    }
    Ok(())
}

type HostSide = Box<dyn FnMut(&mut Unstructured<'_>, &mut Vec<UnixStream>) -> Result<()>>;

/// A driver that knows how it is done and does it wrong.
struct Driver<D> {
    mmio: Mmio<D>,
    mem: Arc<GuestMemory>,
    /// Operations the device waits for.
    pending: Vec<Op>,
    /// Queues whose chains have no readable part.
    write_only: &'static [usize],
    host: HostSide,
    streams: Vec<UnixStream>,
}

impl<D: Device> Driver<D> {
    fn new(device: D, write_only: &'static [usize]) -> Result<Self> {
        let mem = MEM.with(Arc::clone);
        let counters = Arc::new(Counters::default());
        let line = Arc::new(Line::new(5, Arc::new(Nobody), Arc::clone(&counters)));
        let wiring = Wiring { mem: Arc::clone(&mem), line, counters };
        let mmio = Mmio::new(State::default(), device, wiring).unwrap_or_else(|e| panic!("{e}"));
        let host: HostSide = Box::new(|_, _| Ok(()));
        Ok(Self { mmio, mem, pending: Vec::new(), write_only, host, streams: Vec::new() })
    }

    fn execute(
        &mut self,
        u: &mut Unstructured<'_>,
        request: impl Fn(&mut Unstructured<'_>) -> Result<Vec<u8>>,
    ) -> Result<()> {
        let outcome = self.misbehave(u, request);
        // A device that is reset comes back, whatever was done to it before.
        self.write(register::STATUS, 0);
        self.collect();
        while let Some(op) = self.pending.pop() {
            self.finish(op, 0, false);
        }
        assert_eq!(self.mmio.in_flight(), 0, "in flight after a reset");
        assert!(!self.mmio.is_resetting(), "a reset that never ends");
        outcome
    }

    fn misbehave(
        &mut self,
        u: &mut Unstructured<'_>,
        request: impl Fn(&mut Unstructured<'_>) -> Result<Vec<u8>>,
    ) -> Result<()> {
        for (at, len) in RAM {
            self.put(at, &vec![0; len]);
        }
        for index in 0..D::QUEUE_SIZES.len() {
            self.write_ring(index, u, &request)?;
        }
        self.bring_up(u)?;
        for _ in 0..u.int_in_range(1..=12)? {
            match u.int_in_range(0..=9)? {
                0..=3 => self.ring(u.int_in_range(0..=D::QUEUE_SIZES.len() as u32)?),
                4 => self.write(u.int_in_range(0..=0x120_u64)?, u.arbitrary()?),
                5 => self.mmio.read(u.int_in_range(0..=0x120_u64)?, &mut [0; 4]),
                6 => self.complete_one(u)?,
                7 => (self.host)(u, &mut self.streams)?,
                8 => drop(self.mmio.state()),
                _ => self.write_ring(u.choose_index(D::QUEUE_SIZES.len())?, u, &request)?,
            }
            self.collect();
        }
        Ok(())
    }

    fn bring_up(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let mut writes = Vec::new();
        let greeted = status::ACKNOWLEDGE | status::DRIVER;
        let event_idx: bool = u.arbitrary()?;
        writes.extend([(register::STATUS, 1), (register::STATUS, greeted)]);
        writes.extend([(register::DRIVER_FEATURES_SEL, 1), (register::DRIVER_FEATURES, 1)]);
        writes.extend([
            (register::DRIVER_FEATURES_SEL, 0),
            (register::DRIVER_FEATURES, u32::from(event_idx) << 29),
        ]);
        writes.push((register::STATUS, greeted | status::FEATURES_OK));
        for (index, &most) in D::QUEUE_SIZES.iter().enumerate() {
            let size = if u.ratio(1, 4)? { u.int_in_range(0..=most)? } else { most };
            let base = index as u32 * 0x2000;
            writes.extend([(register::QUEUE_SEL, index as u32), (register::QUEUE_SIZE, size.into())]);
            writes.extend([(register::QUEUE_DESC_LOW, base), (register::QUEUE_DRIVER_LOW, base + 0x1000)]);
            writes.extend([(register::QUEUE_DEVICE_LOW, base + 0x1800), (register::QUEUE_READY, 1)]);
        }
        writes.push((register::STATUS, greeted | status::FEATURES_OK | status::DRIVER_OK));
        if u.ratio(1, 4)? {
            let at = u.choose_index(writes.len())?;
            writes[at].1 = u.arbitrary()?;
        }
        writes.into_iter().for_each(|(offset, value)| self.write(offset, value));
        Ok(())
    }

    /// Writes descriptors, an available ring and what the descriptors point at.
    fn write_ring(
        &mut self,
        index: usize,
        u: &mut Unstructured<'_>,
        request: impl Fn(&mut Unstructured<'_>) -> Result<Vec<u8>>,
    ) -> Result<()> {
        let base = index as u64 * 0x2000;
        let count = u.int_in_range(1..=8_u16)?;
        let writable_only = self.write_only.contains(&index);
        for n in 0..count {
            let first = n % 3 == 0;
            let at = if first { BUFFERS + u64::from(n) * 0x400 } else { self.buffer(u)? };
            if first {
                self.put(at, &request(u)?);
            }
            let len: u32 = match u.int_in_range(0..=7)? {
                0 => u.arbitrary()?,
                1..=3 if first => 16,
                4 | 5 if first => 44,
                2 => 1,
                3 => 512,
                _ => u.int_in_range(0..=0x3000)?,
            };
            let write = if u.ratio(1, 8)? { u.arbitrary()? } else { writable_only || !first };
            let next = if u.ratio(1, 8)? { u.arbitrary()? } else { n + 1 };
            let more = n % 3 != 2 && !writable_only;
            let flags =
                if u.ratio(1, 16)? { u.arbitrary()? } else { u16::from(more) | u16::from(write) << 1 };
            let at_descriptor = base + u64::from(n) * 16;
            self.put(at_descriptor, &at.to_le_bytes());
            self.put(at_descriptor + 8, &len.to_le_bytes());
            self.put(at_descriptor + 12, &flags.to_le_bytes());
            self.put(at_descriptor + 14, &next.to_le_bytes());
        }
        let heads = u.int_in_range(0..=6_u16)?;
        for n in 0..heads {
            let head = if u.ratio(1, 16)? { u.arbitrary()? } else { n * 3 % count };
            self.put(base + 0x1004 + u64::from(n) * 2, &head.to_le_bytes());
        }
        let available = if u.ratio(1, 16)? { u.arbitrary()? } else { heads };
        self.put(base + 0x1002, &available.to_le_bytes());
        Ok(())
    }

    fn buffer(&self, u: &mut Unstructured<'_>) -> Result<u64> {
        let offset: u16 = u.arbitrary()?;
        Ok(match u.int_in_range(0..=15)? {
            0 => u.arbitrary()?,
            1 => 0x1_0000 - u64::from(offset & 0xff),
            2 => offset.into(),
            _ => 0x2_0000 + u64::from(offset & 0xbfff),
        })
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(at)).unwrap_or_else(|e| panic!("{e}"));
    }

    fn write(&mut self, offset: u64, value: u32) {
        match self.mmio.write(offset, &value.to_le_bytes()) {
            Effect::None | Effect::Resetting => {}
            Effect::Notify(queue) => self.service(queue),
            Effect::Live => (0..D::QUEUE_SIZES.len()).for_each(|queue| self.service(queue)),
        }
    }

    fn ring(&mut self, queue: u32) {
        self.write(register::QUEUE_NOTIFY, queue);
    }

    fn service(&mut self, queue: usize) {
        let ends = (0..MOST_TURNS).any(|_| self.mmio.service(queue) == Turn::Idle);
        assert!(ends, "the device never comes to an end");
    }

    fn collect(&mut self) {
        self.pending.extend(self.mmio.take_ops());
        assert!(self.pending.len() < 100_000, "operations pile up");
    }

    fn complete_one(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let op = self.pending.remove(u.choose_index(self.pending.len())?);
        let result = match u.int_in_range(0..=5)? {
            0 => u.arbitrary()?,
            1 => -libc::EAGAIN,
            2 => -libc::EIO,
            3 => 0,
            // All of it; for a poll, readable and writable.
            _ => i32::MAX,
        };
        self.finish(op, result, u.arbitrary()?);
        Ok(())
    }

    /// Does an operation, or says that it came out as `result`, and tells the device.
    fn finish(&mut self, op: Op, result: i32, more: bool) {
        let token = op.token();
        let done = match op {
            Op::Read { file, buffers, offset, .. } => {
                let read = buffers.read_cached(&file, offset);
                let fault = read.as_ref().err().and_then(std::io::Error::raw_os_error) == Some(libc::EFAULT);
                assert!(!fault, "a buffer that is not guest memory");
                let result = if result == i32::MAX { buffers.len() as i32 } else { result };
                Done { token, result, more: false, buffers: Some(buffers) }
            }
            Op::Write { buffers, .. } => {
                let result = if result == i32::MAX { buffers.len() as i32 } else { result };
                Done { token, result, more: false, buffers: Some(buffers) }
            }
            Op::Poll { multi, .. } => {
                Done { token, result: result & 0x3f, more: more && multi, buffers: None }
            }
            Op::Sync { .. } | Op::Allocate { .. } => {
                Done { token, result: result.min(0), more: false, buffers: None }
            }
            Op::Unpoll { .. } => return,
        };
        if self.mmio.complete(done) == Turn::More {
            (0..D::QUEUE_SIZES.len()).for_each(|queue| self.service(queue));
        }
        self.pending.extend(self.mmio.take_ops());
    }
}
