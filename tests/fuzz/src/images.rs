//! What makers of images and registries hand over: names, manifests and configurations, layers.
//!
//! Promises: no panic; a name that is understood is understood again as it prints itself; an image made of
//! layers is one that the inspector accepts, and a refused layer says why.

use arbitrary::{Result, Unstructured};
use peregrine_image::inspect_image;
use peregrine_image::oci::{Reference, build_layers, parse_documents};
use std::path::Path;

const BLOCK_BYTES: usize = 512;

/// The name of an image.
pub fn reference(data: &[u8]) {
    let _ = name(&mut Unstructured::new(data));
}

fn name(u: &mut Unstructured<'_>) -> Result<()> {
    const PARTS: &[&str] = &[
        "a",
        "python",
        "docker.io",
        "localhost",
        "127.0.0.1",
        "[::1]",
        ":",
        ":5000",
        "/",
        "//",
        "@",
        "@sha256:",
        ".",
        "..",
        "_",
        "__",
        "-",
        "latest",
        "UP",
        "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "\0",
        "é",
        " ",
    ];
    let mut text = String::new();
    for _ in 0..u.int_in_range(0..=12)? {
        text.push_str(u.choose(PARTS)?);
    }
    if u.ratio(1, 4)? {
        text = String::from_utf8_lossy(u.bytes(u.len())?).into_owned();
    }
    match Reference::parse(&text) {
        Ok(reference) => {
            let again = Reference::parse(&reference.to_string()).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(again.to_string(), reference.to_string(), "{text:?}");
            let familiar = Reference::parse(&reference.familiar()).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(familiar.to_string(), reference.to_string(), "{text:?}");
            assert!(!reference.repository().split('/').any(|part| part.is_empty() || part.starts_with('.')));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    Ok(())
}

/// A manifest, index or configuration.
pub fn manifest(data: &[u8]) {
    let _ = document(&mut Unstructured::new(data));
}

fn document(u: &mut Unstructured<'_>) -> Result<()> {
    const DIGEST: &str = "\"sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"";
    const KEYS: &[&str] = &[
        "schemaVersion",
        "manifests",
        "config",
        "layers",
        "digest",
        "size",
        "mediaType",
        "platform",
        "os",
        "architecture",
        "variant",
        "rootfs",
        "diff_ids",
        "Env",
        "Cmd",
        "Entrypoint",
        "User",
        "WorkingDir",
        "annotations",
    ];
    fn value(u: &mut Unstructured<'_>, depth: u32, out: &mut String) -> Result<()> {
        match u.int_in_range(0..=if depth > 5 { 6 } else { 9 })? {
            0 => out.push_str("null"),
            1 => out.push('2'),
            2 => out.push_str(&u.arbitrary::<i64>()?.to_string()),
            3 => out.push_str(DIGEST),
            4 => out.push_str("\"linux\""),
            5 => out.push_str("\"amd64\""),
            6 => out.push_str("\"A=\\u0000\""),
            7 => {
                out.push('[');
                for n in 0..u.int_in_range(0..=3)? {
                    out.push_str(if n > 0 { "," } else { "" });
                    value(u, depth + 1, out)?;
                }
                out.push(']');
            }
            _ => {
                out.push('{');
                for n in 0..u.int_in_range(0..=5)? {
                    out.push_str(if n > 0 { "," } else { "" });
                    out.push_str(&format!("\"{}\":", u.choose(KEYS)?));
                    value(u, depth + 1, out)?;
                }
                out.push('}');
            }
        }
        Ok(())
    }
    let mut text = String::new();
    value(u, 0, &mut text)?;
    let mut bytes = text.into_bytes();
    if u.ratio(1, 8)? && !bytes.is_empty() {
        let at = u.choose_index(bytes.len())?;
        bytes[at] = u.arbitrary()?;
    }
    parse_documents(&bytes);
    Ok(())
}

/// Layers of tar.
pub fn layer(data: &[u8]) {
    let _ = layers(&mut Unstructured::new(data));
}

fn layers(u: &mut Unstructured<'_>) -> Result<()> {
    let mut all = Vec::new();
    for _ in 0..u.int_in_range(1..=3)? {
        let mut tar = Vec::new();
        for _ in 0..u.int_in_range(0..=8)? {
            entry(u, &mut tar)?;
        }
        if u.ratio(3, 4)? {
            tar.extend_from_slice(&[0; 2 * BLOCK_BYTES]);
        }
        if u.ratio(1, 8)? && !tar.is_empty() {
            let at = u.choose_index(tar.len())?;
            tar[at] = u.arbitrary()?;
        }
        if u.ratio(1, 16)? {
            // Magic numbers of the compressions, and noise behind.
            let magic: &[u8] = if u.arbitrary()? { &[0x1f, 0x8b, 8, 0] } else { &[0x28, 0xb5, 0x2f, 0xfd] };
            tar = [magic, u.bytes(u.len().min(64))?].concat();
        }
        all.push(tar);
    }
    let dir = scratch();
    let path = dir.join(format!("{:?}.erofs", std::thread::current().id()));
    let _ = std::fs::remove_file(&path);
    let layers: Vec<&[u8]> = all.iter().map(Vec::as_slice).collect();
    match build_layers(&path, &layers, 1 << 20, 100) {
        Ok(()) => {
            let info =
                inspect_image(&path).unwrap_or_else(|e| panic!("an image that cannot be mounted: {e}"));
            assert!(info.inodes >= 1 && info.feature_incompat == 0);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    Ok(())
}

fn scratch() -> &'static Path {
    static DIR: std::sync::OnceLock<tempfile::TempDir> = std::sync::OnceLock::new();
    DIR.get_or_init(|| tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"))).path()
}

fn path(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    const NAMES: &[&[u8]] = &[
        b"a",
        b"b",
        b"c",
        b"etc",
        b".",
        b"..",
        b".wh.a",
        b".wh.b",
        b".wh..wh..opq",
        b".wh.",
        b"",
        b"\xff",
        b"long-name-long-name",
    ];
    let mut path = Vec::new();
    for n in 0..u.int_in_range(1..=3)? {
        if n > 0 || u.ratio(1, 8)? {
            path.push(b'/');
        }
        path.extend_from_slice(u.choose(NAMES)?);
    }
    Ok(path)
}

/// A header with a right checksum, mostly, and contents of mostly the right length.
fn entry(u: &mut Unstructured<'_>, tar: &mut Vec<u8>) -> Result<()> {
    let mut header = [0_u8; BLOCK_BYTES];
    let kind = *u.choose(b"00000555221346xgLKSZ\0")?;
    let contents = match kind {
        b'x' | b'g' => pax(u)?,
        b'L' | b'K' => path(u)?,
        b'0' | 0 => vec![b'c'; u.int_in_range(0..=1500)?],
        _ => Vec::new(),
    };
    let (name, link) = (path(u)?, path(u)?);
    header[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
    header[100..107].copy_from_slice(b"0000644");
    header[108..115].copy_from_slice(b"0000000");
    let size = if u.ratio(1, 16)? { u.arbitrary::<u32>()?.into() } else { contents.len() as u64 };
    header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    header[156] = kind;
    header[157..157 + link.len().min(100)].copy_from_slice(&link[..link.len().min(100)]);
    header[257..265].copy_from_slice(b"ustar\x0000");
    if u.ratio(1, 16)? {
        let at = u.choose_index(BLOCK_BYTES)?;
        header[at] = u.arbitrary()?;
    }
    header[148..156].copy_from_slice(b"        ");
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    tar.extend_from_slice(&header);
    tar.extend_from_slice(&contents);
    tar.resize(tar.len().next_multiple_of(BLOCK_BYTES), 0);
    Ok(())
}

fn pax(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    const KEYS: &[&str] = &[
        "path",
        "linkpath",
        "size",
        "uid",
        "mtime",
        "SCHILY.xattr.user.a",
        "SCHILY.xattr.security.b",
        "GNU.sparse.x",
        "",
    ];
    let mut text = Vec::new();
    for _ in 0..u.int_in_range(0..=3)? {
        let value = if u.ratio(1, 2)? { path(u)? } else { u.arbitrary::<u16>()?.to_string().into_bytes() };
        let key = u.choose(KEYS)?;
        let rest = key.len() + value.len() + 3;
        let length = if rest + 2 >= 100 {
            rest + 3
        } else if rest + 1 >= 10 {
            rest + 2
        } else {
            rest + 1
        };
        let length = if u.ratio(1, 16)? { usize::from(u.arbitrary::<u8>()?) } else { length };
        text.extend_from_slice(format!("{length} {key}=").as_bytes());
        text.extend_from_slice(&value);
        text.push(b'\n');
    }
    Ok(text)
}
