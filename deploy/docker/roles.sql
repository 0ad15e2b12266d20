-- Variables of psql: owner_password, app_password.
CREATE ROLE riskfleet_owner LOGIN CREATEROLE NOSUPERUSER NOBYPASSRLS PASSWORD :'owner_password';
CREATE ROLE riskfleet_app LOGIN NOCREATEROLE NOSUPERUSER NOBYPASSRLS PASSWORD :'app_password';
CREATE DATABASE riskfleet OWNER riskfleet_owner;
REVOKE ALL ON DATABASE riskfleet FROM PUBLIC;
GRANT CONNECT, TEMPORARY ON DATABASE riskfleet TO riskfleet_app;
