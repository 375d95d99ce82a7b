//! The published client, unmodified, against `peregrine serve` on real microVMs: every method of it.
#![allow(clippy::unwrap_used)]

use tests::daemon::Daemon;
use tests::kvm_or_skip;

const CONFIG: &str = "[image_aliases]\n\"node:22-slim\" = \"default\"\n[defaults]\nmem_mib = 128\n";

#[test]
fn every_method_of_the_published_client_does_what_it_promises() {
    if !kvm_or_skip("every_method_of_the_published_client_does_what_it_promises") {
        return;
    }
    let daemon = Daemon::start(CONFIG);
    let output = daemon.node("client.mjs", &[]);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}\n{stderr}");
    eprint!("{stdout}");
}
