// Slow, idle and large clients: who dawdles is cut, who is idle costs little, and a good client does not notice.
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import http from 'node:http';
import net from 'node:net';

const { ISORUN_API_URL: base, ISORUN_API_KEY: key } = process.env;
const { hostname: host, port } = new URL(base);
const headers = { authorization: `Bearer ${key}` };
const call = async (method, path, body) => {
  const response = await fetch(base + path, { method, headers, body: body && JSON.stringify(body) });
  assert.ok(response.ok, `${method} ${path}: ${response.status}`);
  return response.json();
};
const connect = () => new Promise((resolve, reject) => {
  const socket = net.connect(port, host, () => resolve(socket));
  socket.once('error', reject);
});

if (process.argv[2] === 'connections') {
  // Slow heads: a byte now and then does not help.
  const slow = await Promise.all(Array.from({ length: 50 }, connect));
  const cut = slow.map((socket) => new Promise((wake) => socket.on('close', wake).on('error', () => {})));
  const drip = setInterval(() => slow.forEach((socket) => socket.destroyed || socket.write('x')), 200);
  slow.forEach((socket) => socket.write('GET /healthz HTTP/1.1\r\nx-a: '));
  // A slow body, meanwhile.
  const lazy = await connect();
  lazy.write(`POST /v1/runs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ${key}\r\ncontent-length: 100\r\n\r\n{`);
  const answer = new Promise((wake) => lazy.once('data', (bytes) => wake(bytes.toString())));

  const idle = [];
  for (let i = 0; i < 10_000; i += 500) idle.push(...(await Promise.all(Array.from({ length: 500 }, connect))));
  assert.equal(idle.length, 10_000);
  assert.equal((await call('GET', '/healthz')).status, 'ok');
  await Promise.all(cut);
  clearInterval(drip);
  assert.match(await answer, /^HTTP\/1.1 504 /);
  assert.ok(idle.every((socket) => !socket.destroyed), 'who is idle is not cut');
  idle.forEach((socket) => socket.destroy());
  process.exit(0);
}

// A large file up and down again, byte for byte.
const MIB = 2 ** 20;
const mib = Number(process.env.PEREGRINE_TEST_FILE_MIB ?? 256);
const size = mib * MIB;
// Files are in the guest's memory, of which they may take half.
const mem_mib = mib > 256 ? 2 * mib + 2048 : mib > 32 ? 1024 : 128;
const sandbox = await call('POST', '/v1/runs', { mem_mib, timeout: 0 });
const portion = Buffer.alloc(1 << 20);
const sent = createHash('sha256');
const began = performance.now();
await new Promise((resolve, reject) => {
  const upload = http.request({ host, port, method: 'POST', path: `/v1/runs/${sandbox.id}/files/upload?path=/tmp/big`, headers }, (response) => {
    response.resume();
    response.on('end', () => (response.statusCode === 200 ? resolve() : reject(new Error(`upload: ${response.statusCode}`))));
  });
  upload.on('error', reject);
  let at = 0;
  const feed = () => {
    while (at < size) {
      portion.fill(at / MIB);
      sent.update(portion);
      at += portion.length;
      if (!upload.write(Buffer.from(portion))) return upload.once('drain', feed);
    }
    upload.end();
  };
  feed();
});
const middle = performance.now();
const heard = createHash('sha256');
let bytes = 0;
const download = await fetch(`${base}/v1/runs/${sandbox.id}/files/download?path=/tmp/big`, { headers });
for await (const part of download.body) {
  heard.update(part);
  bytes += part.length;
}
assert.equal(bytes, size);
assert.equal(heard.digest('hex'), sent.digest('hex'));
console.log(`${mib} MiB up: ${((middle - began) / 1000).toFixed(1)} s, down: ${((performance.now() - middle) / 1000).toFixed(1)} s`);

// A reader who takes the beginning and then nothing: the rest waits in the guest.
await new Promise((resolve, reject) => {
  http.get({ host, port, path: `/v1/runs/${sandbox.id}/files/download?path=/tmp/big`, headers }, (response) => {
    response.once('data', () => {
      response.pause();
      setTimeout(() => resolve(response.destroy()), 2000);
    });
  }).on('error', reject);
});

// More at once than there are bulk streams, some of them short, and some that nobody stays for.
const at = `${base}/v1/runs/${sandbox.id}/files`;
const pattern = (length, seed) => Buffer.from(Uint8Array.from({ length }, (_, i) => (i * 7 + (i >> 12) * 13 + seed) & 255));
const files = Array.from({ length: 20 }, (_, i) => ({ path: `/tmp/some/${i}`, bytes: pattern(i % 5 ? (1 << 20) + i : 1000 + i, i) }));
for (const { path, bytes } of files) {
  const up = await fetch(`${at}/upload?path=${path}`, { method: 'POST', headers, body: bytes });
  assert.equal(up.status, 200);
  assert.equal((await up.json()).size_bytes, bytes.length);
}
const leave = async (i) => {
  const left = await fetch(`${at}/download?path=/tmp/big`, { headers });
  const reader = left.body.getReader();
  await reader.read();
  if (i % 2) await new Promise((wake) => setTimeout(wake, 200));
  await reader.cancel();
};
const whole = async ({ path, bytes }) => {
  const down = await fetch(`${at}/download?path=${path}`, { headers });
  assert.ok(bytes.equals(Buffer.from(await down.arrayBuffer())), path);
};
await Promise.all([...files.map(whole), ...[0, 1, 2, 3].map(leave)]);

// A fork in the middle of a transfer takes nothing from it, and its child does not hold on to it.
const reading = (await fetch(`${at}/download?path=/tmp/big`, { headers })).body.getReader();
let got = (await reading.read()).value.length;
const [child] = (await call('POST', `/v1/runs/${sandbox.id}/fork`, { count: 1 })).forks;
for (let part; !(part = await reading.read()).done; ) got += part.value.length;
assert.equal(got, size);
const { path, bytes: expected } = files[1];
const down = await fetch(`${base}/v1/runs/${child.id}/files/download?path=${path}`, { headers });
assert.ok(expected.equals(Buffer.from(await down.arrayBuffer())), 'of a child');
await call('DELETE', `/v1/runs/${child.id}`);

// A guest without the device that bulk streams need.
const gone = await call('POST', `/v1/runs/${sandbox.id}/exec`, { command: 'rm /dev/mem', timeout: 240 });
assert.equal(gone.exit_code, 0, gone.stderr);
await whole(files[1]);
const again = { path: '/tmp/some/again', bytes: pattern(1 << 20, 99) };
assert.equal((await fetch(`${at}/upload?path=${again.path}`, { method: 'POST', headers, body: again.bytes })).status, 200);
await whole(again);
await call('DELETE', `/v1/runs/${sandbox.id}`);
