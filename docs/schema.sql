CREATE FUNCTION public.rf_digests() RETURNS text[]
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$ SELECT coalesce(nullif(current_setting('rf.digests', true), ''), '{}')::text[] $$;

CREATE FUNCTION public.rf_forward_only() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF NEW.tenant <> OLD.tenant OR NEW.seq <= OLD.seq THEN
        RAISE EXCEPTION 'the audit is append-only: a head moves forward only';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION public.rf_refuse() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN RAISE EXCEPTION 'the audit is append-only: % on % is refused', TG_OP, TG_TABLE_NAME; END $$;

CREATE FUNCTION public.rf_tenants() RETURNS text[]
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$ SELECT coalesce(nullif(current_setting('rf.tenants', true), ''), '{}')::text[] $$;

CREATE TABLE public.api_keys (
    key_id text NOT NULL,
    tenant text NOT NULL,
    mac bytea NOT NULL,
    role text DEFAULT 'SERVICE'::text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    revoked_at timestamp with time zone
);

CREATE TABLE public.approvals (
    tenant text NOT NULL,
    event_id text NOT NULL,
    revision integer NOT NULL,
    opened_at timestamp with time zone NOT NULL,
    status text DEFAULT 'open'::text NOT NULL,
    reasons text[] NOT NULL,
    closed_by text,
    closed_at timestamp with time zone,
    CONSTRAINT approvals_status CHECK ((status = ANY (ARRAY['open'::text, 'approved'::text, 'rejected'::text, 'superseded'::text])))
);

ALTER TABLE ONLY public.approvals FORCE ROW LEVEL SECURITY;

CREATE TABLE public.audit_checkpoints (
    tenant text NOT NULL,
    seq bigint NOT NULL,
    hash bytea NOT NULL,
    key_id text NOT NULL,
    signature bytea NOT NULL,
    signed_at timestamp with time zone NOT NULL
);

ALTER TABLE ONLY public.audit_checkpoints FORCE ROW LEVEL SECURITY;

CREATE TABLE public.audit_heads (
    tenant text NOT NULL,
    seq bigint NOT NULL,
    hash bytea NOT NULL
);

ALTER TABLE ONLY public.audit_heads FORCE ROW LEVEL SECURITY;

CREATE TABLE public.audit_records (
    tenant text NOT NULL,
    seq bigint NOT NULL,
    record_id text NOT NULL,
    event_id text NOT NULL,
    n integer NOT NULL,
    digest text NOT NULL,
    body bytea NOT NULL,
    prev_hash bytea NOT NULL,
    hash bytea NOT NULL,
    recorded_at timestamp with time zone NOT NULL
);

ALTER TABLE ONLY public.audit_records FORCE ROW LEVEL SECURITY;

CREATE TABLE public.dead_letters (
    letter_id text NOT NULL,
    tenant text NOT NULL,
    event_id text NOT NULL,
    stage text NOT NULL,
    category text NOT NULL,
    problem text NOT NULL,
    exception_class text NOT NULL,
    fingerprint text NOT NULL,
    attempts integer NOT NULL,
    first_failed_at timestamp with time zone NOT NULL,
    last_failed_at timestamp with time zone NOT NULL,
    parked_at timestamp with time zone NOT NULL,
    status text DEFAULT 'open'::text NOT NULL,
    replays integer DEFAULT 0 NOT NULL,
    body bytea NOT NULL,
    CONSTRAINT dead_letters_status CHECK ((status = ANY (ARRAY['open'::text, 'closed'::text, 'replayed'::text, 'discarded'::text])))
);

ALTER TABLE ONLY public.dead_letters FORCE ROW LEVEL SECURITY;

CREATE TABLE public.decisions (
    tenant text NOT NULL,
    event_id text NOT NULL,
    revision integer NOT NULL,
    outcome text NOT NULL,
    decided_by text NOT NULL,
    body_digest text NOT NULL,
    digest text NOT NULL,
    decision bytea NOT NULL,
    state bytea NOT NULL,
    score numeric,
    decided_at timestamp with time zone NOT NULL,
    superseded_by text,
    CONSTRAINT decisions_decided_by CHECK ((decided_by = ANY (ARRAY['pipeline'::text, 'person'::text]))),
    CONSTRAINT decisions_outcome CHECK ((outcome = ANY (ARRAY['APPROVED'::text, 'REQUIRE_APPROVAL'::text, 'REJECTED'::text]))),
    CONSTRAINT decisions_revision CHECK ((revision >= 1))
);

ALTER TABLE ONLY public.decisions FORCE ROW LEVEL SECURITY;

CREATE TABLE public.events (
    tenant text NOT NULL,
    event_id text NOT NULL,
    identity text,
    body_digest text NOT NULL,
    kind text NOT NULL,
    type text NOT NULL,
    subject_type text NOT NULL,
    subject_id text NOT NULL,
    amount numeric,
    currency text,
    occurred_at timestamp with time zone NOT NULL,
    received_at timestamp with time zone NOT NULL,
    correlation_id text NOT NULL,
    body bytea NOT NULL
);

ALTER TABLE ONLY public.events FORCE ROW LEVEL SECURITY;

CREATE TABLE public.labels (
    tenant text NOT NULL,
    label_id text NOT NULL,
    event_id text NOT NULL,
    label text NOT NULL,
    source text NOT NULL,
    effective_at timestamp with time zone NOT NULL,
    received_at timestamp with time zone NOT NULL,
    body bytea NOT NULL
);

ALTER TABLE ONLY public.labels FORCE ROW LEVEL SECURITY;

CREATE TABLE public.outbox (
    tenant text NOT NULL,
    message_id text NOT NULL,
    exchange text NOT NULL,
    routing_key text NOT NULL,
    headers jsonb DEFAULT '{}'::jsonb NOT NULL,
    body bytea NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL
);

ALTER TABLE ONLY public.outbox FORCE ROW LEVEL SECURITY;

CREATE TABLE public.registry_active (
    tenant text NOT NULL,
    kind text NOT NULL,
    scope_key text NOT NULL,
    name text NOT NULL,
    version integer NOT NULL,
    activated_at timestamp with time zone DEFAULT now() NOT NULL
);

ALTER TABLE ONLY public.registry_active FORCE ROW LEVEL SECURITY;

CREATE TABLE public.registry_versions (
    tenant text NOT NULL,
    kind text NOT NULL,
    name text NOT NULL,
    version integer NOT NULL,
    digest text NOT NULL,
    content bytea NOT NULL,
    status text DEFAULT 'draft'::text NOT NULL,
    author text NOT NULL,
    approver text,
    reason text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    approved_at timestamp with time zone,
    CONSTRAINT registry_versions_approved CHECK (((status <> ALL (ARRAY['approved'::text, 'active'::text])) OR ((approver IS NOT NULL) AND (approved_at IS NOT NULL)))),
    CONSTRAINT registry_versions_four_eyes CHECK ((approver <> author)),
    CONSTRAINT registry_versions_kind CHECK ((kind = ANY (ARRAY['model'::text, 'prompt'::text, 'policy'::text, 'guardrail'::text]))),
    CONSTRAINT registry_versions_status CHECK ((status = ANY (ARRAY['draft'::text, 'submitted'::text, 'approved'::text, 'active'::text, 'rejected'::text, 'retired'::text, 'revoked'::text])))
);

ALTER TABLE ONLY public.registry_versions FORCE ROW LEVEL SECURITY;

CREATE TABLE public.tenants (
    tenant_id text NOT NULL,
    name text NOT NULL,
    broker_user text,
    thresholds jsonb DEFAULT '{}'::jsonb NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    status text DEFAULT 'active'::text NOT NULL,
    CONSTRAINT tenants_id CHECK ((tenant_id ~ '^[a-z0-9][a-z0-9-]{0,62}$'::text))
);

CREATE TABLE public.users (
    user_id text NOT NULL,
    name text NOT NULL,
    role text NOT NULL,
    password_hash text,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    disabled_at timestamp with time zone
);

ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_pkey PRIMARY KEY (key_id);

ALTER TABLE ONLY public.approvals
    ADD CONSTRAINT approvals_pkey PRIMARY KEY (tenant, event_id, revision);

ALTER TABLE ONLY public.audit_checkpoints
    ADD CONSTRAINT audit_checkpoints_pkey PRIMARY KEY (tenant, seq);

ALTER TABLE ONLY public.audit_heads
    ADD CONSTRAINT audit_heads_pkey PRIMARY KEY (tenant);

ALTER TABLE ONLY public.audit_records
    ADD CONSTRAINT audit_records_pkey PRIMARY KEY (tenant, seq);

ALTER TABLE ONLY public.audit_records
    ADD CONSTRAINT audit_records_record UNIQUE (tenant, record_id);

ALTER TABLE ONLY public.dead_letters
    ADD CONSTRAINT dead_letters_pkey PRIMARY KEY (letter_id);

ALTER TABLE ONLY public.decisions
    ADD CONSTRAINT decisions_pkey PRIMARY KEY (tenant, event_id, revision);

ALTER TABLE ONLY public.events
    ADD CONSTRAINT events_pkey PRIMARY KEY (tenant, event_id);

ALTER TABLE ONLY public.labels
    ADD CONSTRAINT labels_pkey PRIMARY KEY (tenant, label_id);

ALTER TABLE ONLY public.outbox
    ADD CONSTRAINT outbox_pkey PRIMARY KEY (tenant, message_id);

ALTER TABLE ONLY public.registry_active
    ADD CONSTRAINT registry_active_pkey PRIMARY KEY (kind, tenant, scope_key);

ALTER TABLE ONLY public.registry_versions
    ADD CONSTRAINT registry_versions_pkey PRIMARY KEY (kind, tenant, name, version);

ALTER TABLE ONLY public.tenants
    ADD CONSTRAINT tenants_broker_user UNIQUE (broker_user);

ALTER TABLE ONLY public.tenants
    ADD CONSTRAINT tenants_pkey PRIMARY KEY (tenant_id);

ALTER TABLE ONLY public.users
    ADD CONSTRAINT users_pkey PRIMARY KEY (user_id);

CREATE INDEX api_keys_by_tenant ON public.api_keys USING btree (tenant);

CREATE INDEX approvals_open ON public.approvals USING btree (tenant, opened_at) WHERE (status = 'open'::text);

CREATE INDEX audit_records_event ON public.audit_records USING btree (tenant, event_id);

CREATE INDEX dead_letters_event ON public.dead_letters USING btree (tenant, event_id);

CREATE INDEX dead_letters_open ON public.dead_letters USING btree (tenant, parked_at) WHERE (status = 'open'::text);

CREATE INDEX decisions_decided ON public.decisions USING btree (tenant, decided_at, event_id);

CREATE INDEX events_subject ON public.events USING btree (tenant, subject_type, subject_id, occurred_at);

CREATE INDEX labels_event ON public.labels USING btree (tenant, event_id);

CREATE INDEX outbox_created ON public.outbox USING btree (created_at);

CREATE INDEX registry_versions_digest ON public.registry_versions USING btree (digest);

CREATE TRIGGER forward_only BEFORE UPDATE ON public.audit_heads FOR EACH ROW EXECUTE FUNCTION public.rf_forward_only();

ALTER TABLE public.audit_heads ENABLE ALWAYS TRIGGER forward_only;

CREATE TRIGGER refuse_delete BEFORE DELETE ON public.audit_heads FOR EACH STATEMENT EXECUTE FUNCTION public.rf_refuse();

ALTER TABLE public.audit_heads ENABLE ALWAYS TRIGGER refuse_delete;

CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON public.audit_checkpoints FOR EACH STATEMENT EXECUTE FUNCTION public.rf_refuse();

ALTER TABLE public.audit_checkpoints ENABLE ALWAYS TRIGGER refuse_truncate;

CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON public.audit_heads FOR EACH STATEMENT EXECUTE FUNCTION public.rf_refuse();

ALTER TABLE public.audit_heads ENABLE ALWAYS TRIGGER refuse_truncate;

CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON public.audit_records FOR EACH STATEMENT EXECUTE FUNCTION public.rf_refuse();

ALTER TABLE public.audit_records ENABLE ALWAYS TRIGGER refuse_truncate;

CREATE TRIGGER refuse_update BEFORE DELETE OR UPDATE ON public.audit_checkpoints FOR EACH STATEMENT EXECUTE FUNCTION public.rf_refuse();

ALTER TABLE public.audit_checkpoints ENABLE ALWAYS TRIGGER refuse_update;

CREATE TRIGGER refuse_update BEFORE DELETE OR UPDATE ON public.audit_records FOR EACH STATEMENT EXECUTE FUNCTION public.rf_refuse();

ALTER TABLE public.audit_records ENABLE ALWAYS TRIGGER refuse_update;

ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_tenant FOREIGN KEY (tenant) REFERENCES public.tenants(tenant_id);

ALTER TABLE public.approvals ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.audit_checkpoints ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.audit_heads ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.audit_records ENABLE ROW LEVEL SECURITY;

CREATE POLICY by_digest ON public.registry_versions FOR SELECT USING ((digest = ANY (( SELECT public.rf_digests() AS rf_digests)::text[])));

ALTER TABLE public.dead_letters ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.decisions ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.events ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.labels ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.outbox ENABLE ROW LEVEL SECURITY;

CREATE POLICY own_tenants ON public.approvals USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.audit_checkpoints USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.audit_heads USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.audit_records USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.dead_letters USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.decisions USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.events USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.labels USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.outbox USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.registry_active USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.registry_versions USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

ALTER TABLE public.registry_active ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.registry_versions ENABLE ROW LEVEL SECURITY;

CREATE POLICY shared ON public.registry_active FOR SELECT USING ((tenant = '*'::text));

CREATE POLICY shared ON public.registry_versions FOR SELECT USING ((tenant = '*'::text));

GRANT USAGE ON SCHEMA public TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.api_keys TO riskfleet_app;

GRANT UPDATE(revoked_at) ON TABLE public.api_keys TO riskfleet_app;

GRANT SELECT,INSERT,UPDATE ON TABLE public.approvals TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.audit_checkpoints TO riskfleet_app;

GRANT SELECT,INSERT,UPDATE ON TABLE public.audit_heads TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.audit_records TO riskfleet_app;

GRANT SELECT,INSERT,UPDATE ON TABLE public.dead_letters TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.decisions TO riskfleet_app;

GRANT UPDATE(superseded_by) ON TABLE public.decisions TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.events TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.labels TO riskfleet_app;

GRANT SELECT,INSERT,DELETE ON TABLE public.outbox TO riskfleet_app;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.registry_active TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.registry_versions TO riskfleet_app;

GRANT UPDATE(status) ON TABLE public.registry_versions TO riskfleet_app;

GRANT UPDATE(approver) ON TABLE public.registry_versions TO riskfleet_app;

GRANT UPDATE(reason) ON TABLE public.registry_versions TO riskfleet_app;

GRANT UPDATE(approved_at) ON TABLE public.registry_versions TO riskfleet_app;

GRANT SELECT,INSERT,UPDATE ON TABLE public.tenants TO riskfleet_app;

GRANT SELECT,INSERT,UPDATE ON TABLE public.users TO riskfleet_app;
