// A command of an image runs as the image says: its user, its directory, its environment.
import assert from 'node:assert/strict';
import { Isorun } from 'isorun';

const [image, ...wanted] = process.argv.slice(2);
const client = new Isorun();
const sandbox = await client.create({ image, memMiB: 256 });
assert.equal(sandbox.image, image);
const ran = await sandbox.exec('id; pwd; echo $GREETING $HOME', 240);
assert.deepEqual(ran, { exitCode: 0, stdout: wanted.map((line) => `${line}\n`).join(''), stderr: '' });
await sandbox.destroy();
client.close();
