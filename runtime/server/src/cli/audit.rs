//! `peregrine audit`: what became of an audit log.

use super::CliError;
use clap::{Args, Subcommand};
use peregrine_audit::{AuditError, ChainKey, Checkpoint, Report, Trust, Verdict, VerifyingKey, verify};
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};

/// Look after audit logs
#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Verify(VerifyArgs),
}

/// Verify a tenant's audit log
///
/// Reads the log from its first entry and says whether anything was changed, dropped, swapped, inserted, cut off or rolled
/// back, and which entry shows it. Memory does not grow with the log.
///
/// With the chain's first key (`initial.key`, which belongs on another machine) every entry's MAC is compared. Without it the
/// signed checkpoints still vouch for all that the last of them covers.
///
/// Exit code: 0 if the log is intact; 1 if it was tampered with; 2 if it ends in a line torn by a crash and all else is
/// intact; 125 if it cannot be read.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The tenant's log directory, or a copy of it
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Whose log it is said to be [default: the directory's name]
    #[arg(long)]
    tenant: Option<String>,
    /// The file of the chain's first key [default: DIR/initial.key, if it is there]
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The public key that signs checkpoints, 64 hexadecimal digits [default: DIR/../signer.pub, if it is there]
    #[arg(long, value_name = "HEX")]
    signer: Option<String>,
    /// A file of checkpoints that were kept elsewhere; may be repeated
    #[arg(long, value_name = "FILE")]
    checkpoints: Vec<PathBuf>,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
}

/// Does the verb; the value is the exit code.
pub(crate) fn audit(args: &AuditArgs) -> Result<u8, CliError> {
    let Verb::Verify(args) = &args.verb;
    let report = report(args)?;
    let (code, word, text) = match &report.verdict {
        Verdict::Intact => (0, "intact", String::new()),
        Verdict::Broken { entry, how } => (1, "tampered", format!("entry {entry}: {how}")),
        Verdict::Torn { bytes } => {
            (2, "torn", format!("{bytes} bytes of an unfinished entry at the end: a crash, not tampering"))
        }
    };
    if args.json {
        let value = serde_json::json!({
            "verdict": word, "entries": report.entries, "checkpoints": report.checkpoints, "reason": text,
        });
        println!("{value}");
    } else {
        let (entries, checkpoints) = (report.entries, report.checkpoints);
        println!("{word}: {entries} entries, {checkpoints} checkpoints{}{text}", separator(&text));
    }
    Ok(code)
}

fn separator(text: &str) -> &'static str {
    if text.is_empty() { "" } else { "; " }
}

fn report(args: &VerifyArgs) -> Result<Report, CliError> {
    let name = || args.dir.canonicalize().ok()?.file_name()?.to_str().map(str::to_owned);
    let tenant = args.tenant.clone().or_else(name).ok_or_else(|| CliError::Argument {
        what: "--tenant",
        given: args.dir.display().to_string(),
        limit: "must be given where the directory's name is not the tenant's",
    })?;
    let trust = Trust { tenant, key: key(args)?, signer: signer(args)?, checkpoints: checkpoints(args)? };
    if trust.key.is_none() && trust.signer.is_none() {
        return Err(CliError::Argument {
            what: "--key or --signer",
            given: String::new(),
            limit: "one of them must be given: without both nothing vouches for the log",
        });
    }
    let path = args.dir.join("log.ndjson");
    let read = File::open(&path).and_then(|log| verify(BufReader::with_capacity(1 << 20, log), trust));
    read.map_err(|source| CliError::Audit(AuditError::File { path, source }))
}

fn malformed(path: &Path, what: &str) -> CliError {
    CliError::Audit(AuditError::Malformed { path: path.to_owned(), what: what.to_owned() })
}

/// The text of `given`, or of `fallback` if that is there.
fn text(given: Option<&Path>, fallback: &Path) -> Result<Option<(PathBuf, String)>, CliError> {
    let path = given.unwrap_or(fallback);
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some((path.to_owned(), text))),
        Err(e) if given.is_none() && e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CliError::Audit(AuditError::File { path: path.to_owned(), source })),
    }
}

fn key(args: &VerifyArgs) -> Result<Option<ChainKey>, CliError> {
    let Some((path, text)) = text(args.key.as_deref(), &args.dir.join("initial.key"))? else {
        return Ok(None);
    };
    let key = ChainKey::from_hex(&text).ok_or_else(|| malformed(&path, "not 64 hexadecimal digits"))?;
    Ok(Some(key))
}

fn signer(args: &VerifyArgs) -> Result<Option<VerifyingKey>, CliError> {
    let bad = "not the 64 hexadecimal digits of an Ed25519 public key";
    if let Some(text) = &args.signer {
        let wrong = || CliError::Argument { what: "--signer", given: text.clone(), limit: bad };
        return VerifyingKey::from_hex(text).ok_or_else(wrong).map(Some);
    }
    let Some((path, text)) = text(None, &args.dir.join("../signer.pub"))? else { return Ok(None) };
    VerifyingKey::from_hex(&text).ok_or_else(|| malformed(&path, bad)).map(Some)
}

fn checkpoints(args: &VerifyArgs) -> Result<Vec<Checkpoint>, CliError> {
    let beside = args.dir.join("checkpoints.ndjson");
    let paths = args.checkpoints.iter().chain(beside.exists().then_some(&beside));
    let mut checkpoints = Vec::new();
    for path in paths {
        let refused = |source| CliError::Audit(AuditError::File { path: path.clone(), source });
        let mut reader = BufReader::new(File::open(path).map_err(refused)?);
        let mut line = String::new();
        while reader.read_line(&mut line).map_err(refused)? > 0 {
            // The last line may be torn by a crash: a checkpoint that was never whole vouches for nothing.
            if line.ends_with('\n') {
                let checkpoint = serde_json::from_str(&line);
                checkpoints.push(checkpoint.map_err(|_| malformed(path, "not a checkpoint on every line"))?);
            }
            line.clear();
        }
    }
    Ok(checkpoints)
}
