// A daemon is killed while twenty sandboxes run and output is followed. `before` kills it and notes what it has seen;
// then, with the next daemons, `after` and `later`: everything runs on, and what was followed goes on behind the last event that its reader has seen.
import assert from 'node:assert/strict';
import { readFile, writeFile } from 'node:fs/promises';
import { Isorun } from 'isorun';

const SANDBOXES = 20;
const client = new Isorun();
const base = process.env.ISORUN_API_URL;
const headers = { authorization: `Bearer ${process.env.ISORUN_API_KEY}` };
const [, , phase] = process.argv;
const notes = `${process.env.PEREGRINE_STATE}/../notes.json`;

// Reads a command's events into `seen` until its end, `enough`, or the daemon's death.
async function follow(seen, body, enough = () => false) {
  const again = seen.last ? { 'last-event-id': seen.last } : {};
  const response = await fetch(`${base}/v1/runs/${seen.run}/exec/stream`, {
    method: 'POST',
    headers: { ...headers, ...again },
    body: body && JSON.stringify(body),
  });
  assert.equal(response.status, 200, await (response.status === 200 ? '' : response.text()));
  let text = '';
  for await (const bytes of response.body) {
    text += Buffer.from(bytes).toString('latin1');
    for (let end; (end = text.indexOf('\n\n')) >= 0; text = text.slice(end + 2)) {
      const fields = Object.fromEntries(text.slice(0, end).split('\n').map((line) => line.split(/: (.*)/s)));
      if (!fields.event) continue;
      const event = JSON.parse(fields.data);
      seen.last = fields.id;
      seen.text += event.data ?? '';
      if (fields.event === 'exit') return event.exit_code;
      assert.notEqual(fields.event, 'error', fields.data);
      if (enough(seen)) return undefined;
    }
  }
  throw new Error('the stream ended before the command');
}

const bootId = async (sandbox) => (await sandbox.exec('cat /proc/sys/kernel/random/boot_id')).stdout;
const commands = {
  // Its output comes piece by piece, all the while.
  slow: { command: 'for i in 1 2 3 4 5 6 7 8 9 10 11 12; do echo $i; sleep 0.3; done; exit 7', timeout: 240 },
  // More than anybody holds: the command waits for its reader, whoever the daemon is.
  large: { command: 'seq 1 120000; exit 8', timeout: 240 },
  // Over before anybody asks for its end.
  short: { command: 'echo one; exit 9', timeout: 240 },
};
const expected = {
  slow: [7, Array.from({ length: 12 }, (_, i) => `${i + 1}\n`).join('')],
  large: [8, Array.from({ length: 120000 }, (_, i) => `${i + 1}\n`).join('')],
  short: [9, 'one\n'],
};

if (phase === 'before') {
  const parent = await client.create({ timeoutSec: 0 });
  await parent.writeFile('/tmp/word', 'kept');
  const all = [parent, ...(await parent.fork(SANDBOXES - 1))];
  const [, one, two] = all;
  const boots = [await bootId(one), await bootId(two)];
  assert.notEqual(boots[0], boots[1]);
  const seen = {
    slow: { run: one.id, text: '' },
    large: { run: two.id, text: '' },
    short: { run: two.id, text: '' },
  };
  // Attached when the daemon dies; the others are left by their readers before.
  let some;
  const started = new Promise((resolve) => (some = resolve));
  const attached = follow(seen.slow, commands.slow, (so) => void (so.text.includes('3\n') && some())).catch(() => 'broken');
  await follow(seen.large, commands.large, (so) => so.text.length > 50_000);
  await follow(seen.short, commands.short, () => true);
  await started;
  process.kill(Number(process.env.DAEMON_PID), 'SIGKILL');
  assert.equal(await attached, 'broken');
  await writeFile(notes, JSON.stringify({ ids: all.map((s) => s.id), boots, seen, killed: Date.now() }));
} else if (phase === 'after') {
  const { ids, boots, seen, killed } = JSON.parse(await readFile(notes));
  assert.deepEqual((await client.list()).map((s) => s.id).sort(), ids.toSorted());
  for (const sandbox of await client.list()) assert.equal((await sandbox.info()).status, 'running');
  for (const name of ['slow', 'large', 'short']) {
    const code = await follow(seen[name]);
    assert.deepEqual([code, seen[name].text.length], [expected[name][0], expected[name][1].length], name);
    assert.ok(seen[name].text === expected[name][1], `${name}: other bytes`);
  }
  const [, one, two] = await Promise.all(ids.map((id) => client.get(id)));
  assert.deepEqual([await bootId(one), await bootId(two)], boots, 'no guest has booted again');
  await writeFile(notes, JSON.stringify({ ids, boots, killed }));
} else {
  // A daemon later, which was not killed but stopped, and told to keep them.
  const { ids, boots, killed } = JSON.parse(await readFile(notes));
  assert.deepEqual((await client.list()).map((s) => s.id).sort(), ids.toSorted());
  const [parent, one, two] = await Promise.all(ids.map((id) => client.get(id)));
  assert.equal(await bootId(one), boots[0]);
  // All verbs work on what was taken over.
  assert.equal(await parent.readFile('/tmp/word'), 'kept');
  const [child] = await one.fork(1);
  assert.equal(await child.readFile('/tmp/word'), 'kept');
  await two.hibernate();
  await two.resume();
  assert.equal(await two.readFile('/tmp/word'), 'kept');
  assert.equal((await one.exec('exit 4')).exitCode, 4);
  const elapsed = Date.now() - killed;
  for (const id of [...ids, child.id]) {
    const destroyed = await (await client.get(id)).destroy();
    assert.equal(destroyed.status, 'destroyed');
    // The time between the daemons counts, once.
    if (id !== child.id && id !== two.id) {
      assert.ok(destroyed.uptimeMs >= elapsed && destroyed.uptimeMs < elapsed + 600_000, JSON.stringify(destroyed));
    }
  }
  assert.equal((await client.usage()).activeSandboxes, 0);
}
client.close();
