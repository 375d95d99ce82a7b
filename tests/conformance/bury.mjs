// Sandboxes that were destroyed are gone, though the daemon is killed when it has just said so.
// Usage: bury.mjs
import assert from 'node:assert/strict';

const { ISORUN_API_URL: base, ISORUN_API_KEY: key, DAEMON_PID: daemon } = process.env;
const call = async (method, path, body) => {
  const response = await fetch(base + path, {
    method,
    headers: { authorization: `Bearer ${key}` },
    body: body && JSON.stringify(body),
  });
  return { status: response.status, value: await response.json() };
};
const made = [];
while (made.length < 12) {
  const { status, value } = await call('POST', '/v1/runs', { timeout: 0 });
  assert.equal(status, 201, JSON.stringify(value));
  made.push(value.id);
}
const ends = await Promise.all(made.map((id) => call('DELETE', `/v1/runs/${id}`)));
process.kill(Number(daemon), 'SIGKILL');
for (const { status, value } of ends) assert.equal(status, 200, JSON.stringify(value));
