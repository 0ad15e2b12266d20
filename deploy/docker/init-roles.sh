#!/bin/sh
# Runs once, when the database volume is empty: the owner migrates, the application owns nothing and so cannot pass
# row-level security by.
set -eu
psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
  --set owner_password="$RISKFLEET_OWNER_PASSWORD" --set app_password="$RISKFLEET_APP_PASSWORD" \
  --file /etc/riskfleet/roles.sql
