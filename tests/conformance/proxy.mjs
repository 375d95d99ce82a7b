// A server in a sandbox, reached from outside: with a key, by both anonymous forms, and over a WebSocket.
import assert from 'node:assert/strict';
import http from 'node:http';
import { Isorun } from 'isorun';

// A server of a few lines: says what it was asked, and echoes WebSocket frames.
const server = `
import base64, hashlib, socket, threading
def serve(c):
    f = c.makefile('rb')
    while True:
        line = f.readline().decode()
        if not line: return
        head = {}
        while (h := f.readline().decode().strip()): k, v = h.split(': ', 1); head[k.lower()] = v
        if 'upgrade' in head:
            key = head['sec-websocket-key'] + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11'
            accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
            c.sendall(('HTTP/1.1 101 Switching\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\nSec-WebSocket-Accept: %s\\r\\n\\r\\n' % accept).encode())
            while True:
                b = f.read(2)
                if len(b) < 2 or b[0] & 15 == 8: return c.close()
                n = b[1] & 127; mask = f.read(4); data = bytes(x ^ mask[i % 4] for i, x in enumerate(f.read(n)))
                c.sendall(bytes([0x81, n]) + data)
        body = f.read(int(head.get('content-length', 0)))
        text = (line.strip() + '\\n' + head['host'] + '\\n' + str('authorization' in head) + '\\n' + str(len(body))).encode()
        c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n' % len(text) + text)
s = socket.create_server(('127.0.0.1', 3000))
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
`;

const client = new Isorun();
const sandbox = await client.create({ timeoutSec: 0 });
await sandbox.writeFile('/srv/server.py', server);
await sandbox.exec('python3 /srv/server.py >/tmp/log 2>&1 & while ! grep -q 0BB8 /proc/net/tcp; do sleep 0.2; done', 120);

const base = new URL(client.apiUrl);
const ask = (host, path, headers = {}, method = 'GET', body) => new Promise((resolve, reject) => {
  const request = http.request({ host: base.hostname, port: base.port, path, method, headers: { host, ...headers } }, (response) => {
    let text = '';
    response.on('data', (bytes) => (text += bytes)).on('end', () => resolve({ status: response.statusCode, text }));
  });
  request.on('error', reject).end(body);
});
const bearer = { authorization: `Bearer ${process.env.ISORUN_API_KEY}` };
const path = new URL(sandbox.url(3000, '/a/b?c=d')).pathname + '?c=d';

assert.deepEqual(await ask(base.host, path, bearer), { status: 200, text: 'GET /a/b?c=d HTTP/1.1\nlocalhost:3000\nFalse\n0' });
assert.deepEqual(await ask(base.host, path, bearer, 'POST', 'x'.repeat(200_000)),
  { status: 200, text: 'POST /a/b?c=d HTTP/1.1\nlocalhost:3000\nFalse\n200000' });
assert.equal((await ask(base.host, path)).status, 401);
assert.equal((await ask(`3000-${sandbox.id}.localhost:${base.port}`, '/q')).text.split('\n')[0], 'GET /q HTTP/1.1');
assert.equal((await ask(`${sandbox.id}.localhost`, '/sb/p/3000/r?s')).text.split('\n')[0], 'GET /r?s HTTP/1.1');
assert.equal((await ask(`3000-run00000000000000000000.localhost`, '/')).status, 404);
const closed = await ask(`3001-${sandbox.id}.localhost`, '/');
assert.deepEqual([closed.status, JSON.parse(closed.text).code], [502, 'port_not_open']);

const url = `${sandbox.url(3000, '/ws').replace('http', 'ws')}?token=${process.env.ISORUN_API_KEY}`;
const socket = new WebSocket(url);
const said = await new Promise((resolve, reject) => {
  const heard = [];
  socket.onopen = () => ['one', 'two'].forEach((word) => socket.send(word));
  socket.onmessage = ({ data }) => { heard.push(data); if (heard.length === 2) resolve(heard); };
  socket.onerror = (error) => reject(new Error(error.message));
});
assert.deepEqual(said, ['one', 'two']);
socket.close();
await sandbox.destroy();
client.close();
