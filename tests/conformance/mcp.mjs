// The published client's MCP server, over standard input and output, as an MCP client starts it.
import assert from 'node:assert/strict';
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StdioClientTransport } from '@modelcontextprotocol/sdk/client/stdio.js';

const transport = new StdioClientTransport({
  command: process.execPath,
  args: [`${import.meta.dirname}/node_modules/isorun/dist/mcp-cli.js`],
  env: { ...process.env },
});
const client = new Client({ name: 'conformance', version: '1' });
await client.connect(transport);
const call = async (name, args) => {
  const result = await client.callTool({ name, arguments: args }, undefined, { timeout: 120_000 });
  assert.ok(!result.isError, JSON.stringify(result));
  return result.content[0].text;
};
const id = await call('create_sandbox', { timeoutSec: 120 });
assert.match(id, /^run[0-9a-f]{20}$/);
assert.equal(await call('exec', { sandboxId: id, command: 'echo out; echo err >&2; exit 3' }), 'out\nSTDERR:\nerr\n[exit code: 3]');
assert.equal(await call('list_sandboxes', {}), id);
const checkpoint = await call('checkpoint', { sandboxId: id });
assert.equal(await call('hibernate', { sandboxId: id }), 'hibernated');
assert.equal(await call('resume', { sandboxId: id }), 'running');
const second = await call('restore', { snapshotId: checkpoint });
for (const sandboxId of [id, second]) {
  assert.equal(JSON.parse(await call('destroy_sandbox', { sandboxId })).status, 'destroyed');
}
await client.close();
