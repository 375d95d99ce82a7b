// What the published client does not use, over plain fetch and WebSocket: streams, terminal, shell, idempotency.
import assert from 'node:assert/strict';

const base = process.env.ISORUN_API_URL;
const key = process.env.ISORUN_API_KEY;
const call = async (method, path, body, headers = {}) => {
  const response = await fetch(base + path, {
    method,
    headers: { authorization: `Bearer ${key}`, ...headers },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const text = await response.text();
  return { status: response.status, headers: response.headers, body: text ? JSON.parse(text) : null };
};
const step = async (name, action) => {
  const begun = performance.now();
  const value = await action();
  console.log(`${name}: ${(performance.now() - begun).toFixed(1)} ms`);
  return value;
};

// Events of a server-sent stream, as they come.
async function* events(path, body, headers = {}, signal) {
  const response = await fetch(base + path, {
    method: 'POST',
    headers: { authorization: `Bearer ${key}`, ...headers },
    body: body && JSON.stringify(body),
    signal,
  });
  if (response.status !== 200) {
    throw new Error(`${response.status} ${await response.text()}`);
  }
  assert.equal(response.headers.get('content-type'), 'text/event-stream');
  let text = '';
  for await (const bytes of response.body) {
    text += Buffer.from(bytes).toString('latin1');
    for (let end; (end = text.indexOf('\n\n')) >= 0; text = text.slice(end + 2)) {
      const fields = Object.fromEntries(text.slice(0, end).split('\n').map((line) => line.split(/: (.*)/s)));
      if (fields.event) yield { id: fields.id, event: fields.event, ...JSON.parse(Buffer.from(fields.data, 'latin1')) };
    }
  }
}

const { body: run } = await call('POST', '/v1/runs', { timeout: 0 });
const at = `/v1/runs/${run.id}`;

await step('a line is there before the next one is written', async () => {
  const seen = [];
  for await (const event of events(`${at}/exec/stream`, { command: 'mkfifo /tmp/go; echo first; read line </tmp/go; echo $line >&2; exit 5', timeout: 240 })) {
    seen.push(event);
    if (event.data === 'first\n') {
      // The command waits for this: were its first line held back, nothing would ever come.
      const made = await call('POST', `${at}/exec`, { command: 'echo second >/tmp/go', timeout: 240 });
      assert.equal(made.status, 200);
    }
  }
  assert.deepEqual(seen.map((e) => [e.event, e.data ?? e.exit_code]), [['stdout', 'first\n'], ['stderr', 'second\n'], ['exit', 5]]);
  assert.deepEqual(seen.map((e) => e.seq), seen.map((_, index) => index + 1));
});

await step('a broken stream goes on from its last event', async () => {
  const body = { command: "printf 'one\\n'; sleep 0.5; printf '\\377\\376'; sleep 0.5; echo three; exit 9", timeout: 240 };
  let last;
  const abort = new AbortController();
  for await (const event of events(`${at}/exec/stream`, body, {}, abort.signal)) {
    last = event;
    break;
  }
  abort.abort();
  assert.equal(last.data, 'one\n');
  const rest = [];
  for await (const event of events(`${at}/exec/stream`, undefined, { 'last-event-id': last.id })) rest.push(event);
  const bytes = Buffer.concat(rest.filter((e) => e.event === 'stdout').map((e) =>
    e.data === undefined ? Buffer.from(e.data_base64, 'base64') : Buffer.from(e.data)));
  assert.deepEqual(bytes, Buffer.from([0xff, 0xfe, ...Buffer.from('three\n')]));
  assert.equal(rest.at(-1).exit_code, 9);
  const again = [];
  for await (const event of events(`${at}/exec/stream`, undefined, { 'last-event-id': last.id })) again.push(event);
  assert.deepEqual(again, rest);
});

const socket = (path) => new Promise((resolve, reject) => {
  const url = `${base.replace('http', 'ws')}${path}${path.includes('?') ? '&' : '?'}token=${encodeURIComponent(key)}`;
  const ws = new WebSocket(url);
  ws.binaryType = 'arraybuffer';
  const queue = [];
  const waiting = [];
  ws.onmessage = ({ data }) => (waiting.length ? waiting.shift()(data) : queue.push(data));
  ws.onclose = () => { ws.over = true; waiting.forEach((wake) => wake(null)); };
  ws.next = () => (queue.length ? Promise.resolve(queue.shift()) : ws.over ? Promise.resolve(null) : new Promise((wake) => waiting.push(wake)));
  ws.onopen = () => resolve(ws);
  ws.onerror = (error) => reject(new Error(`${path}: ${error.message}`));
});

// Nobody closes this session: it ends with the sandbox.
let left;
await step('200 commands of one shell, in order, keep directory and variables', async () => {
  const shell = await socket(`${at}/shell`);
  const ask = async (command) => {
    shell.send(JSON.stringify({ run: command }));
    return JSON.parse(await shell.next());
  };
  assert.deepEqual(await ask('cd /tmp; x=1; echo it\\\'s; echo err >&2; (exit 3)'), { stdout: "it's\n", stderr: 'err\n', exit_code: 3 });
  const begun = performance.now();
  // All at once: the answers come in the order of the questions.
  for (let i = 0; i < 200; i++) shell.send(JSON.stringify({ run: `echo ${i} $((x++)) $PWD`, id: i }));
  for (let i = 0; i < 200; i++) {
    assert.deepEqual(JSON.parse(await shell.next()), { id: i, stdout: `${i} ${i + 1} /tmp\n`, stderr: '', exit_code: 0 });
  }
  console.log(`  a command: ${((performance.now() - begun) / 200).toFixed(1)} ms`);
  assert.deepEqual(await ask('printf "no line feed"; false'), { stdout: 'no line feed', stderr: '', exit_code: 1 });
  assert.deepEqual(await ask('echo $?; cat'), { stdout: '1\n', stderr: '', exit_code: 0 });
  const broken = await ask('if');
  assert.match(broken.stderr, /syntax error/);
  assert.notEqual(broken.exit_code, 0);
  assert.equal((await ask('exec 1>/tmp/log; echo kept; exec 1>&199; cat /tmp/log')).stdout, 'kept\n');
  left = shell;
});

await step('exit 42 ends the shell, and what comes later fails', async () => {
  const shell = await socket(`${at}/shell`);
  const ask = async (command) => {
    shell.send(JSON.stringify({ run: command }));
    return JSON.parse(await shell.next());
  };
  assert.deepEqual(await ask('echo bye; exit 42'), { stdout: 'bye\n', stderr: '', exit_code: 42 });
  assert.deepEqual(await ask('echo more'), { error: 'Shell is closed' });
  shell.close();
});

await step('a terminal has the size it is given, and ends with its code', async () => {
  const terminal = await socket(`${at}/terminal?rows=30&cols=100&command=${encodeURIComponent('stty size; read x; stty size; exit 6')}`);
  const decoder = new TextDecoder();
  let text = '';
  while (!text.includes('30 100')) text += decoder.decode(await terminal.next());
  terminal.send(JSON.stringify({ type: 'resize', rows: 40, cols: 120 }));
  terminal.send(new TextEncoder().encode('\r'));
  let last;
  for (let data; (data = await terminal.next()) !== null;) {
    if (typeof data === 'string') last = JSON.parse(data);
    else text += decoder.decode(data);
  }
  assert.match(text, /40 120/);
  assert.deepEqual(last, { type: 'exit', exit_code: 6 });
});

await step('the same Idempotency-Key makes one sandbox', async () => {
  const headers = { 'idempotency-key': 'k1' };
  const two = await Promise.all([1, 2].map(() => call('POST', '/v1/runs', { timeout: 60 }, headers)));
  assert.equal(two[0].status, 201);
  assert.equal(two[0].body.id, two[1].body.id);
  assert.equal((await call('POST', '/v1/runs', { timeout: 61 }, headers)).body.code, 'idempotency_key_reused');
  const once = await call('DELETE', `/v1/runs/${two[0].body.id}`);
  const twice = await call('DELETE', `/v1/runs/${two[0].body.id}`);
  assert.deepEqual(once, { ...twice, headers: once.headers });
  assert.equal(once.body.status, 'destroyed');
});

await step('a sandbox that is idle for its timeout is gone', async () => {
  const { body } = await call('POST', '/v1/runs', { timeout: 1 });
  for (let i = 0; (await call('GET', `/v1/runs/${body.id}`)).status === 200; i++) {
    assert.ok(i < 600);
    await new Promise((wake) => setTimeout(wake, 100));
  }
  assert.equal((await call('GET', '/v1/runs/history?limit=1')).body.sandboxes[0].id, body.id);
});
await step('the end of a sandbox is the end of its sessions', async () => {
  await call('DELETE', at);
  assert.equal(await left.next(), null);
});
