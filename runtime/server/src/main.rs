//! The `peregrine` command: parses its arguments, does one verb, exits with one code.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
