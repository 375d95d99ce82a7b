//! A snapshot while the guest's socket, disk and database are at work.

use peregrine_vmm::agent::{Agent, Command, Grants};
use peregrine_vmm::worker::Going;
use std::ops::ControlFlow;
use tests::sandbox::{go, parked, sh, turn};
use tests::{PATIENCE, drain, kvm_or_skip};

/// Transactions that keep two tables equal, until it is told to end; then its own check of its work.
const DATABASE: &str = r"
import os, sqlite3
db = sqlite3.connect('/tmp/db', isolation_level=None)
db.execute('create table a (n integer primary key, text text)')
db.execute('create table b (n integer primary key, text text)')
n = 0
while not os.path.exists('/tmp/end'):
    db.execute('begin')
    for _ in range(10):
        n += 1
        for table in 'ab':
            db.execute(f'insert into {table} values (?, ?)', (n, str(n) * 20))
    db.execute('commit')
    with open('/tmp/rows', 'w') as rows:
        rows.write(f'{n}\n')
db.close()
open('/tmp/ended', 'w').close()
";

/// Reads a file from the disk, not from memory, and digests it; again and again.
const DISK: &str = r"
import hashlib, os
while not os.path.exists('/tmp/end'):
    fd = os.open('/usr/bin/bash', os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with os.fdopen(fd, 'rb') as file, open('/tmp/digests', 'a') as digests:
        digests.write(hashlib.sha256(file.read()).hexdigest() + '\n')
";

const CHECK: &str = r"
import sqlite3
db = sqlite3.connect('/tmp/db')
ok = db.execute('pragma integrity_check').fetchall()
rows = [db.execute(f'select count(*), max(n) from {table}').fetchone() for table in 'ab']
same = db.execute('select count(*) from a join b using (n, text)').fetchone()
told = int(open('/tmp/rows').read())
print(ok == [('ok',)] and rows[0] == rows[1] == (told, told) and same == (told,), told)
";

fn python(agent: &mut Agent, script: &str) -> u32 {
    agent.exec(&Command::new(&["python3", "-c", script])).unwrap()
}

/// Takes output of a command until there are so many bytes of it.
fn take(agent: &mut Agent, stream: u32, grants: &mut Grants, text: &mut Vec<u8>, bytes: usize) {
    let writer = agent.writer();
    let taken = agent.pump(|from, message| {
        if let guest_init::ToHost::Stdout(part) = message
            && from == stream
        {
            text.extend_from_slice(part);
            grants.taken(part.len(), &writer)?;
        }
        Ok(if text.len() < bytes { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    });
    taken.unwrap();
}

/// Both loads go on, then end, and their work is right. Gives the database's rows.
fn check(guest: &mut Going) -> u64 {
    let more = "rows=$(cat /tmp/rows); reads=$(wc -l </tmp/digests); \
                until test $(cat /tmp/rows) -gt $rows && test $(wc -l </tmp/digests) -gt $reads; do sleep 0.2; done; \
                touch /tmp/end; until test -e /tmp/ended; do sleep 0.2; done; \
                sha256sum </usr/bin/bash | cut -d ' ' -f 1; sort -u /tmp/digests";
    let digests = sh(&mut guest.agent, more);
    let digests: Vec<_> = digests.lines().collect();
    assert!(digests.len() == 2 && digests[0] == digests[1], "{digests:?}");
    let output = guest.agent.output(&Command::new(&["python3", "-c", CHECK]), b"").unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let Some(rows) = said.strip_prefix("True ") else {
        panic!("{said}{}", String::from_utf8_lossy(&output.stderr));
    };
    assert_eq!(sh(&mut guest.agent, "seq 1 20000 | sha256sum; seq 20000 | wc -c").lines().count(), 2);
    rows.trim().parse().unwrap()
}

#[test]
fn snapshots_under_socket_and_disk_load_go_on_whole_and_their_databases_pass_their_check() {
    if !kvm_or_skip("snapshots_under_socket_and_disk_load_go_on_whole_and_their_databases_pass_their_check") {
        return;
    }
    let (_turn, template) = turn();
    let home = tempfile::tempdir().unwrap();
    let mut parent = go(parked(&template));
    parent.agent.set_timeout(Some(PATIENCE)).unwrap();
    python(&mut parent.agent, DATABASE);
    python(&mut parent.agent, DISK);
    sh(&mut parent.agent, "until test -s /tmp/rows && test -s /tmp/digests; do sleep 0.2; done");
    let stream = parent.agent.exec(&Command::new(&["seq", "1", "150000"])).unwrap();
    let (mut grants, mut text) = (Grants::new(stream), Vec::new());
    // Output is on its way through the guest's buffers, the device and the socket each time.
    for (index, bytes) in [1, 100_000, 400_000].into_iter().enumerate() {
        take(&mut parent.agent, stream, &mut grants, &mut text, bytes);
        parent.worker.snapshot(&parent.agent, &home.path().join(index.to_string())).unwrap();
    }
    take(&mut parent.agent, stream, &mut grants, &mut text, 600_000);
    let code = drain(&mut parent.agent, stream, &mut text);
    let expected: String = (1..=150_000).map(|n| format!("{n}\n")).collect();
    assert_eq!((code, text == expected.as_bytes()), (0, true), "{} bytes", text.len());
    let parent_rows = check(&mut parent);
    drop(parent);
    for index in ["0", "2"] {
        let rows = check(&mut go(parked(&home.path().join(index))));
        println!("snapshot {index}: {rows} rows, its parent {parent_rows}");
    }
}
