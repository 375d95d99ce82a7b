//! `peregrine key`: API keys.

use super::CliError;
use clap::{Args, Subcommand};
use peregrine::key::Keys;
use std::path::Path;

/// Make and revoke API keys
#[derive(Debug, Args)]
pub(crate) struct KeyArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(CreateArgs),
    Revoke(RevokeArgs),
}

/// Make a key for a tenant and print it, once
///
/// The key is not stored anywhere: a server with the same state directory knows it by its MAC. A tenant sees its own
/// sandboxes, snapshots, history and audit log only; it exists from its first key on.
#[derive(Debug, Args)]
struct CreateArgs {
    /// Whose key: 1 to 32 of a-z, 0-9 and '-', a letter first
    #[arg(long, default_value = "default")]
    tenant: String,
    /// The region that the key names
    #[arg(long, default_value = "local")]
    region: String,
    /// Print key and id as one JSON object
    #[arg(long)]
    json: bool,
}

/// Revoke a key for good; a running server refuses it from its next request on
#[derive(Debug, Args)]
struct RevokeArgs {
    /// The key, or its id
    key: String,
}

/// Does the verb, on the keys in `dir`; the value is the exit code.
pub(crate) fn key(args: &KeyArgs, dir: &Path) -> Result<u8, CliError> {
    let mut keys = Keys::open(dir)?;
    match &args.verb {
        Verb::Create(create) => {
            let minted = keys.mint(&create.tenant, &create.region)?;
            if create.json {
                println!("{}", serde_json::json!({ "id": minted.id, "key": minted.key }));
            } else {
                println!("{}", minted.key);
            }
        }
        Verb::Revoke(revoke) => println!("revoked {}", keys.revoke(&revoke.key)?),
    }
    Ok(0)
}
