#!/bin/sh
# Builds PID 1 as the guest runs it: one static file without a C library. The one place that knows how.
#
#   static.sh TARGET_DIR      the program is then TARGET_DIR/x86_64-unknown-linux-gnu/release/guest-init
set -eu
here=$(cd "$(dirname "$0")" && pwd)
target=x86_64-unknown-linux-gnu

# No start files and no libraries: sys/start.rs has all there is. One segment of code and constants, one of
# data: fewer mappings to make and fewer pages to fault in at start.
flags="-Ctarget-feature=+crt-static -Crelocation-model=static -Cforce-unwind-tables=no"
flags="$flags -Clink-arg=-nostartfiles -Clink-arg=-nostdlib -Clink-arg=-static"
flags="$flags -Clink-arg=-Wl,--build-id=none,--no-eh-frame-hdr,-z,norelro,-z,noseparate-code"

# What a cargo around this one leaves in the environment: flags that would win over RUSTFLAGS, and
# clippy in rustc's place.
unset CARGO_ENCODED_RUSTFLAGS RUSTC_WORKSPACE_WRAPPER
RUSTFLAGS="$flags" \
CARGO_PROFILE_RELEASE_PANIC=abort \
CARGO_PROFILE_RELEASE_OPT_LEVEL=s \
CARGO_PROFILE_RELEASE_LTO=fat \
CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1 \
CARGO_PROFILE_RELEASE_DEBUG=false \
CARGO_PROFILE_RELEASE_STRIP=symbols \
exec "${CARGO:-cargo}" build --release --manifest-path "$here/Cargo.toml" \
    --bin guest-init --features freestanding --target "$target" --target-dir "$1"
