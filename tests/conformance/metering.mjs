// What is billed is time that passed while a sandbox ran, once: over steps of the host's clock (a file holds how far it
// is off), hibernation and a killed daemon, which it outlives. Usage: metering.mjs first | last ID NOT_MS; the first
// says how many milliseconds of CLOCK_MONOTONIC it has not run.
import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { Isorun } from 'isorun';

const clock = `${process.env.PEREGRINE_STATE}/../clock`;
const [step, id, not_ms] = process.argv.slice(2);
const client = new Isorun();
// The same clock in each process.
const now = () => Number(process.hrtime.bigint()) / 1e6;
// Time of sandboxes with 1 GiB each is GiB seconds.
const ran_ms = async () => {
  const { memSeconds, cpuSeconds, totalCostCents } = await client.usage();
  const price = (memSeconds / 3600) * 4.1;
  assert.ok(Math.abs(totalCostCents - price) < 1e-3, `${totalCostCents} cents for ${memSeconds} s`);
  assert.ok(cpuSeconds >= 0);
  return memSeconds * 1000;
};
const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));

if (step === 'first') {
  const begun = now();
  const sandbox = await client.create({ memMiB: 1024, timeoutSec: 0 });
  let last = 0;
  for (const offset of ['+0', '+90d', '-90d', '+10', '-10', '+0']) {
    writeFileSync(clock, offset);
    await sandbox.exec('true', 240);
    const sum = await ran_ms();
    assert.ok(sum > last, `${sum} ms after ${last} ms, at ${offset}`);
    assert.ok(sum <= now() - begun, `${sum} ms of ${now() - begun} ms, at ${offset}`);
    last = sum;
  }
  await sandbox.hibernate();
  const slept = now();
  const asleep = await ran_ms();
  writeFileSync(clock, '+90d');
  await sleep(2000);
  assert.equal(await ran_ms(), asleep, 'sleep costs nothing');
  writeFileSync(clock, '-90d');
  const woken = now();
  await sandbox.resume();
  await sandbox.exec('true', 240);
  const sum = await ran_ms();
  const could = now() - begun - (woken - slept);
  assert.ok(sum > asleep && sum <= could, `${sum} ms of ${could} ms`);
  console.log(`${sandbox.id} ${Math.floor(now() - could)}`);
} else {
  // The daemon was killed and another came: nothing is there twice, and the bill can be read.
  const could = () => now() - Number(not_ms);
  const sum = await ran_ms();
  assert.ok(sum <= could(), `${sum} ms of ${could()} ms`);
  const sandbox = await client.get(id);
  if (sandbox) await sandbox.destroy();
  const past = (await client.history()).filter((run) => run.id === id);
  assert.equal(past.length, 1);
  const { totalCostCents, historyCostCents } = await client.usage();
  assert.equal(totalCostCents, historyCostCents);
  assert.equal(past[0].costCents, historyCostCents);
  assert.ok(past[0].uptimeMs >= 0 && past[0].uptimeMs <= could());
}
client.close();
