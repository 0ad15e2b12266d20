// Publishes one event over AMQP and consumes its decision from a queue of the tenant's own.
// Needs `npm install amqplib`, and the variables AMQP_URL (the tenant's own broker user) and TENANT.
"use strict";
const amqp = require("amqplib");

async function main() {
  const { AMQP_URL, TENANT } = process.env;
  if (!AMQP_URL || !TENANT) throw new Error("set AMQP_URL and TENANT");
  const messageId = process.argv[2] || `node-${Date.now()}-${process.pid}`;
  const user = decodeURIComponent(new URL(AMQP_URL).username);
  const connection = await amqp.connect(AMQP_URL);
  const channel = await connection.createConfirmChannel();

  // Bind first: a decision that is made before anybody listens is found in the feed only.
  const queue = `up.${TENANT}.decisions`;
  await channel.assertQueue(queue, { durable: true });
  await channel.bindQueue(queue, "risk.decisions", `${TENANT}.#`);
  await channel.bindQueue(queue, "risk.rejected", `${TENANT}.#`);

  const decided = new Promise((resolve) => {
    channel.consume(queue, (message) => {
      channel.ack(message);
      if (message.properties.correlationId === messageId) resolve(JSON.parse(message.content));
    });
  });
  const event = {
    type: "payment.card",
    occurred_at: new Date().toISOString(),
    subject: { type: "customer", id: "c-1001" },
    amount: { value: "129.90", currency: "EUR" },
  };
  channel.publish("risk.ingest", `${TENANT}.risk`, Buffer.from(JSON.stringify(event)), {
    messageId,
    correlationId: messageId,
    userId: user, // the broker checks it: nobody can speak for another tenant
    contentType: "application/json",
    persistent: true,
    mandatory: true,
  });
  await channel.waitForConfirms(); // accepted by the broker: from here on the fleet owes an answer
  const timer = setTimeout(() => { console.error("no decision within 30 s"); process.exit(1); }, 30_000);
  const found = await decided;
  clearTimeout(timer);
  console.log(`${found.event_id} ${found.outcome || found.type}`);
  await connection.close();
}

main().catch((error) => { console.error(error.message); process.exit(1); });
