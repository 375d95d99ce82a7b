//! Templates made in a process of their own: while an image's guest boots and warms up, it runs in no process that holds keys,
//! tenants' data or other guests, and its memory is not the daemon's.
//!
//! `peregrine make-template` reads one order, a line of JSON, from its standard input and answers with one on its standard
//! output. It ends when its input does: whoever asked has gone.

use super::{TemplateError, key, prepare, restore};
use peregrine_image::{Lines, Store};
use peregrine_vmm::{DiskConfig, VmConfig, priority};
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The verb of the command line that calls [`serve`].
pub const VERB: &str = "make-template";

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    cache: PathBuf,
    kernel: PathBuf,
    /// Read-only, in the guest's order.
    disks: Vec<PathBuf>,
    vcpus: u32,
    mem_mib: u64,
    /// Restore it too, as its clones will be.
    try_it: bool,
}

/// A template that is there, verified.
#[derive(Debug, Serialize, Deserialize)]
pub struct Made {
    /// Its key in the cache.
    pub key: String,
    /// Its snapshot.
    pub dir: PathBuf,
}

/// Who makes templates.
#[derive(Debug, Clone)]
pub struct Maker {
    program: PathBuf,
    cache: PathBuf,
}

impl Maker {
    /// `program` with the verb [`VERB`]; templates are kept in `store`.
    #[must_use]
    pub fn new(program: &Path, store: &Store) -> Self {
        Self { program: program.to_owned(), cache: store.root().to_owned() }
    }

    /// As [`prepare`], elsewhere. Blocks as long.
    ///
    /// # Errors
    /// Why not.
    pub fn prepare(&self, config: &VmConfig) -> Result<Made, TemplateError> {
        self.ask(config, false)
    }

    /// As [`restore`], elsewhere: a template that is damaged, or does not fit this host, is made again.
    ///
    /// # Errors
    /// Why not.
    pub fn mend(&self, config: &VmConfig) -> Result<Made, TemplateError> {
        self.ask(config, true)
    }

    fn ask(&self, config: &VmConfig, try_it: bool) -> Result<Made, TemplateError> {
        let order = Order {
            cache: self.cache.clone(),
            kernel: config.kernel.clone(),
            disks: config.disks.iter().map(|disk| disk.path.clone()).collect(),
            vcpus: config.vcpus,
            mem_mib: config.mem_mib,
            try_it,
        };
        let failed = |error: io::Error| TemplateError::Maker(error.to_string());
        let mut child = Command::new(&self.program)
            .arg(VERB)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let mut answer = Vec::new();
        let asked = (|| {
            let mut line = serde_json::to_vec(&order)?;
            line.push(b'\n');
            input.as_ref().ok_or(io::ErrorKind::BrokenPipe)?.write_all(&line)?;
            output.ok_or(io::ErrorKind::BrokenPipe)?.read_to_end(&mut answer)
        })();
        // Only now: it works as long as its input is open.
        drop(input);
        let status = child.wait().map_err(failed)?;
        asked.map_err(failed)?;
        match serde_json::from_slice::<Result<Made, String>>(&answer) {
            Ok(answer) => answer.map_err(TemplateError::Maker),
            Err(_) => Err(TemplateError::Maker(format!("the process that makes it ended: {status}"))),
        }
    }
}

/// Does the one order on standard input.
///
/// # Errors
/// If there is none, or nobody reads the answer.
pub fn serve() -> io::Result<()> {
    // Requests come first.
    let _ = priority::equal();
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    let order: Order = serde_json::from_str(&line)?;
    std::thread::spawn(|| {
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        std::process::exit(1);
    });
    let answer = obey(&order).map_err(|error| error.to_string());
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, &answer)?;
    out.flush()
}

fn obey(order: &Order) -> Result<Made, TemplateError> {
    let config = VmConfig {
        kernel: order.kernel.clone(),
        vcpus: order.vcpus,
        mem_mib: order.mem_mib,
        disks: order.disks.iter().map(|path| DiskConfig { path: path.clone(), read_only: true }).collect(),
        kernel_parameters: String::new(),
        verbose: false,
        profile: None,
    };
    let (store, mut progress) = (Store::at(&order.cache)?, Lines::new(io::stderr()));
    if order.try_it {
        drop(restore(&store, &config, &mut progress)?);
    }
    let dir = prepare(&store, &config, &mut progress)?.dir;
    Ok(Made { key: key(&config)?.as_str().to_owned(), dir })
}
