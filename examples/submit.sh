#!/bin/sh
# Submits one event over HTTP with curl, and waits for its decision.
# Needs: GATEWAY (http://127.0.0.1:8080), API_KEY. Repeating with the same id is always safe.
set -eu
: "${GATEWAY:=http://127.0.0.1:8080}" "${API_KEY:?set API_KEY}"
id="${1:-curl-$(date +%s)-$$}"

curl --silent --show-error --fail-with-body "$GATEWAY/v1/risk" \
  --header "Authorization: Bearer $API_KEY" \
  --header "Content-Type: application/json" \
  --header "Prefer: wait=10" \
  --data @- <<JSON
{
  "id": "$id",
  "type": "payment.card",
  "occurred_at": "$(date -u +%Y-%m-%dT%H:%M:%SZ)",
  "subject": {"type": "customer", "id": "c-1001"},
  "amount": {"value": "129.90", "currency": "EUR"}
}
JSON
echo
