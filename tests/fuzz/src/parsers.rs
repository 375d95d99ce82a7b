//! What reads bytes that others made: the agent's wire on both ends, kernels, images.
//!
//! Promises: no panic, and what the wire understands it says again in the same bytes.

use arbitrary::{Result, Unstructured};
use guest_init::{Decoder, FRAME_MAX_BYTES, Frame, Header, Kind, ToGuest, ToHost};
use peregrine_image::{parse_image, parse_kernel};

/// Frames from bytes that come in parts of any size, read as either end would.
pub fn wire(data: &[u8]) {
    let _ = frames(&mut Unstructured::new(data));
}

fn frames(u: &mut Unstructured<'_>) -> Result<()> {
    let mut decoder = Decoder::new(vec![0; FRAME_MAX_BYTES]).unwrap_or_else(|e| panic!("{e}"));
    while !u.is_empty() {
        let mut bytes = Vec::new();
        if u.ratio(7, 8)? {
            // A header that is right, and a payload as long as it says, so that messages are reached.
            let kind = *u.choose(Kind::ALL)?;
            let payload = u.arbitrary::<u8>()?;
            let payload = u.bytes(u.len().min(payload.into()))?;
            let header =
                Header { kind, flags: u.arbitrary()?, stream: u.arbitrary()?, len: payload.len() as u32 };
            bytes.extend_from_slice(&header.to_bytes());
            bytes.extend_from_slice(payload);
        } else {
            bytes.extend_from_slice(u.bytes(u.len().min(40))?);
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let part = u.int_in_range(1..=rest.len())?;
            let taken = decoder.push(&rest[..part]);
            rest = &rest[taken..];
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => again(&frame),
                    Ok(None) => break,
                    Err(error) => {
                        assert!(!error.to_string().is_empty());
                        return Ok(());
                    }
                }
            }
            assert!(taken > 0 || !decoder.space().is_empty(), "a decoder that takes nothing more");
        }
    }
    Ok(())
}

/// A message that is understood is said again in the same words.
fn again(frame: &Frame<'_>) {
    let mut out = vec![0; FRAME_MAX_BYTES];
    if let Ok(message) = ToHost::parse(frame)
        && let Ok(len) = message.encode(frame.stream, &mut out)
    {
        assert_eq!(&out[len - frame.payload.len()..len], frame.payload, "{message:?}");
    }
    if let Ok(message) = ToGuest::parse(frame)
        && let Ok(len) = message.encode(frame.stream, &mut out)
    {
        assert_eq!(&out[len - frame.payload.len()..len], frame.payload, "{message:?}");
    }
}

/// A kernel file.
pub fn kernel(data: &[u8]) {
    let _ = kernel_file(&mut Unstructured::new(data));
}

fn kernel_file(u: &mut Unstructured<'_>) -> Result<()> {
    // The header of a kernel, so that what follows it is read.
    let mut file = vec![0_u8; 64];
    file[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2_u16.to_le_bytes());
    put(18, &62_u16.to_le_bytes());
    put(20, &1_u32.to_le_bytes());
    put(24, &odd(u, 0x10_0000)?.to_le_bytes());
    put(32, &odd(u, 64)?.to_le_bytes());
    put(40, &odd(u, 0)?.to_le_bytes());
    put(52, &64_u16.to_le_bytes());
    put(54, &(odd(u, 56)? as u16).to_le_bytes());
    put(56, &(odd(u, 1)? as u16).to_le_bytes());
    put(58, &64_u16.to_le_bytes());
    for _ in 0..u.int_in_range(0..=3)? {
        file.extend_from_slice(&1_u32.to_le_bytes());
        file.extend_from_slice(&7_u32.to_le_bytes());
        for usual in [0, 0x10_0000, 0x10_0000, 0x100, 0x100, 0x1000] {
            file.extend_from_slice(&odd(u, usual)?.to_le_bytes());
        }
    }
    if u.ratio(1, 8)? {
        let at = u.choose_index(file.len())?;
        file[at] = u.arbitrary()?;
    }
    file.extend_from_slice(u.bytes(u.len())?);
    if let Ok(info) = parse_kernel(&file[..]) {
        assert_eq!(info.bytes, file.len() as u64);
        assert!(info.entry < info.end_of_load);
    }
    Ok(())
}

/// Mostly what is usual.
fn odd(u: &mut Unstructured<'_>, usual: u64) -> Result<u64> {
    Ok(match u.int_in_range(0..=15)? {
        0 => u.arbitrary()?,
        1 => u64::MAX - u64::from(u.arbitrary::<u8>()?),
        2 => u.arbitrary::<u8>()?.into(),
        _ => usual,
    })
}

/// An image file's head and length.
pub fn image(data: &[u8]) {
    let _ = image_file(&mut Unstructured::new(data));
}

fn image_file(u: &mut Unstructured<'_>) -> Result<()> {
    let mut head = vec![0; u.int_in_range(1024..=4096)?];
    let length = if u.ratio(1, 8)? { u.arbitrary()? } else { u64::from(u.arbitrary::<u16>()?) * 512 };
    let usual = u.ratio(15, 16)?;
    let superblock = u.bytes(u.len().min(head.len() - 1024))?;
    head[1024..1024 + superblock.len()].copy_from_slice(superblock);
    if head.len() >= 1152 && usual {
        head[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        head[1024 + 12] = 9 + head[1024 + 12] % 5;
        // Without the checksum's flag more is reached.
        head[1024 + 8] &= !1;
    }
    if let Ok(info) = parse_image(&head, length) {
        assert!(info.bytes <= length);
    }
    Ok(())
}
