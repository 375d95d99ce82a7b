//! Embeds the repository's `kernels/` directory, so that one binary can build its own guest kernel.
//! Writes a table of `include_bytes!` into OUT_DIR; cargo runs it again when anything in there changes.

use std::fmt::Write as _;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

fn main() -> io::Result<()> {
    let required = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .ok_or_else(|| io::Error::other(format!("{name} is not set: run me with cargo")))
    };
    let kernels = required("CARGO_MANIFEST_DIR")?.join("../../kernels");
    println!("cargo:rerun-if-changed={}", kernels.display());
    let mut files = Vec::new();
    collect(&kernels, &mut files)?;
    files.sort();

    let mut table = String::from("pub(super) static FILES: &[EmbeddedFile] = &[\n");
    for file in files {
        let name = file.strip_prefix(&kernels).map_err(io::Error::other)?;
        let executable = file.metadata()?.permissions().mode() & 0o100 != 0;
        let absolute = file.canonicalize()?;
        writeln!(
            table,
            "    EmbeddedFile {{ path: {name:?}, executable: {executable}, bytes: include_bytes!({absolute:?}) }},"
        )
        .map_err(io::Error::other)?;
    }
    table.push_str("];\n");
    std::fs::write(required("OUT_DIR")?.join("embedded_kernels.rs"), table)
}

/// Every regular file under `dir` that can change a kernel: not hidden ones (editor and git droppings), not
/// texts.
fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b".") || name.as_encoded_bytes().ends_with(b".md") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}
