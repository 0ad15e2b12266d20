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

CREATE FUNCTION public.rf_registry_active() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    -- Locked, so that a revocation that commits first is seen, and one that comes later finds this row.
    PERFORM 1 FROM registry_versions v
      WHERE v.kind = NEW.kind AND v.tenant = NEW.tenant AND v.name = NEW.name AND v.version = NEW.version
        AND v.status IN ('approved', 'active') AND v.approver IS NOT NULL
        AND (v.valid_until IS NULL OR v.valid_until > now()) FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'only an approved version whose validation has not expired can be active'
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION public.rf_registry_approval() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ DECLARE found registry_versions%ROWTYPE;
BEGIN
    SELECT * INTO found FROM registry_versions v
     WHERE v.kind = NEW.kind AND v.tenant = NEW.tenant AND v.name = NEW.name AND v.version = NEW.version FOR UPDATE;
    IF found.status IS DISTINCT FROM 'submitted' THEN
        RAISE EXCEPTION 'only a submitted version can be approved' USING ERRCODE = 'check_violation';
    END IF;
    IF found.digest <> NEW.digest THEN
        RAISE EXCEPTION 'an approval is of one content: the digest is another' USING ERRCODE = 'check_violation';
    END IF;
    IF found.author = NEW.approver THEN
        RAISE EXCEPTION 'nobody approves their own version' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION public.rf_registry_version() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP = 'INSERT' THEN
        IF (NEW.status <> 'draft'
            OR num_nonnulls(NEW.submitted_at, NEW.approver, NEW.approved_at, NEW.signature, NEW.key_id) > 0)
           AND NOT pg_has_role(current_user, (SELECT relowner FROM pg_class WHERE oid = TG_RELID), 'MEMBER') THEN
            RAISE EXCEPTION 'a version begins as a draft' USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END IF;
    IF (NEW.tenant, NEW.kind, NEW.name, NEW.version, NEW.digest, NEW.content, NEW.author, NEW.reason, NEW.created_at,
        NEW.owner, NEW.purpose, NEW.use_tag, NEW.limitations, NEW.evidence, NEW.validator, NEW.valid_until)
       IS DISTINCT FROM
       (OLD.tenant, OLD.kind, OLD.name, OLD.version, OLD.digest, OLD.content, OLD.author, OLD.reason, OLD.created_at,
        OLD.owner, OLD.purpose, OLD.use_tag, OLD.limitations, OLD.evidence, OLD.validator, OLD.valid_until) THEN
        RAISE EXCEPTION 'a version never changes: register a new one' USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.status <> OLD.status AND NOT EXISTS (
        SELECT 1 FROM registry_transitions t WHERE t.from_status = OLD.status AND t.to_status = NEW.status) THEN
        RAISE EXCEPTION 'a version may not go from % to %', OLD.status, NEW.status USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.submitted_at IS DISTINCT FROM OLD.submitted_at
       AND NOT (OLD.status = 'draft' AND NEW.status = 'submitted') THEN
        RAISE EXCEPTION 'a version is submitted once' USING ERRCODE = 'check_violation';
    END IF;
    IF (NEW.approver, NEW.approved_at, NEW.signature, NEW.key_id)
       IS DISTINCT FROM (OLD.approver, OLD.approved_at, OLD.signature, OLD.key_id)
       AND NOT (OLD.status = 'submitted' AND NEW.status = 'approved') THEN
        RAISE EXCEPTION 'an approval never changes' USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.status = 'approved' AND OLD.status <> 'approved' AND NOT EXISTS (
        SELECT 1 FROM registry_approvals a
         WHERE a.kind = NEW.kind AND a.tenant = NEW.tenant AND a.name = NEW.name AND a.version = NEW.version
           AND a.digest = NEW.digest AND a.approver = NEW.approver AND a.approved_at = NEW.approved_at) THEN
        RAISE EXCEPTION 'a version is approved by a row in registry_approvals' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION public.rf_tenants() RETURNS text[]
    LANGUAGE sql STABLE PARALLEL SAFE
    AS $$ SELECT coalesce(nullif(current_setting('rf.tenants', true), ''), '{}')::text[] $$;

CREATE TABLE public.api_keys (
    key_id text NOT NULL,
    tenant text NOT NULL,
    mac bytea NOT NULL,
    role text DEFAULT 'SERVICE'::text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    revoked_at timestamp with time zone,
    owner text DEFAULT ''::text NOT NULL,
    label text DEFAULT ''::text NOT NULL,
    expires_at timestamp with time zone,
    CONSTRAINT api_keys_role CHECK ((role = ANY (ARRAY['SERVICE'::text, 'VIEWER'::text])))
);

CREATE TABLE public.approval_votes (
    tenant text NOT NULL,
    event_id text NOT NULL,
    revision integer NOT NULL,
    person text NOT NULL,
    vote text NOT NULL,
    reason text NOT NULL,
    voted_at timestamp with time zone NOT NULL,
    CONSTRAINT approval_votes_vote CHECK ((vote = ANY (ARRAY['approve'::text, 'reject'::text])))
);

ALTER TABLE ONLY public.approval_votes FORCE ROW LEVEL SECURITY;

CREATE TABLE public.approvals (
    tenant text NOT NULL,
    event_id text NOT NULL,
    revision integer NOT NULL,
    opened_at timestamp with time zone NOT NULL,
    status text DEFAULT 'open'::text NOT NULL,
    reasons text[] NOT NULL,
    closed_by text,
    closed_at timestamp with time zone,
    kind text DEFAULT 'risk'::text NOT NULL,
    cause text DEFAULT 'decision'::text NOT NULL,
    opened_by text,
    priority integer DEFAULT 0 NOT NULL,
    amount numeric,
    currency text,
    approvers_needed integer DEFAULT 1 NOT NULL,
    due_at timestamp with time zone,
    expires_at timestamp with time zone,
    expiry_outcome text DEFAULT 'REJECTED'::text NOT NULL,
    claimed_by text,
    claimed_at timestamp with time zone,
    note text,
    close_reason text,
    open_reason text,
    CONSTRAINT approvals_cause CHECK ((cause = ANY (ARRAY['decision'::text, 'reopened'::text, 'contested'::text]))),
    CONSTRAINT approvals_expiry_outcome CHECK ((expiry_outcome = ANY (ARRAY['REJECTED'::text, 'APPROVED'::text]))),
    CONSTRAINT approvals_needed CHECK (((approvers_needed >= 1) AND (approvers_needed <= 2))),
    CONSTRAINT approvals_status CHECK ((status = ANY (ARRAY['open'::text, 'approved'::text, 'rejected'::text, 'superseded'::text, 'expired'::text])))
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
    failed boolean DEFAULT false NOT NULL,
    CONSTRAINT dead_letters_failed CHECK (((NOT failed) OR (status = 'discarded'::text))),
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
    corrects text,
    decider text,
    feed_xid xid8 DEFAULT pg_current_xact_id() NOT NULL,
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

CREATE TABLE public.halts (
    tenant text NOT NULL,
    model text DEFAULT '*'::text NOT NULL,
    reason text NOT NULL,
    set_by text NOT NULL,
    set_at timestamp with time zone NOT NULL
);

ALTER TABLE ONLY public.halts FORCE ROW LEVEL SECURITY;

CREATE TABLE public.imported_history (
    tenant text NOT NULL,
    source text NOT NULL,
    part integer NOT NULL,
    packed bytea NOT NULL
);

ALTER TABLE ONLY public.imported_history FORCE ROW LEVEL SECURITY;

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

CREATE TABLE public.layouts (
    version integer NOT NULL,
    partitions integer NOT NULL,
    filling_from timestamp with time zone NOT NULL,
    retired_at timestamp with time zone,
    removed_at timestamp with time zone,
    CONSTRAINT layouts_partitions CHECK (((partitions >= 1) AND (partitions <= 100))),
    CONSTRAINT layouts_version CHECK (((version >= 1) AND (version <= 9999)))
);

CREATE TABLE public.letter_history (
    tenant text NOT NULL,
    letter_id text NOT NULL,
    number bigint NOT NULL,
    at timestamp with time zone NOT NULL,
    action text NOT NULL,
    result text NOT NULL,
    actor text NOT NULL,
    person text NOT NULL,
    reason text NOT NULL,
    why text NOT NULL,
    request_id text,
    CONSTRAINT letter_history_action CHECK ((action = ANY (ARRAY['replay'::text, 'discard'::text, 'reveal'::text])))
);

ALTER TABLE ONLY public.letter_history FORCE ROW LEVEL SECURITY;

ALTER TABLE public.letter_history ALTER COLUMN number ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.letter_history_number_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.letter_requests (
    tenant text NOT NULL,
    request_id text NOT NULL,
    action text NOT NULL,
    letter_ids text[] NOT NULL,
    force boolean NOT NULL,
    rate_per_s numeric NOT NULL,
    reason text NOT NULL,
    requested_by text NOT NULL,
    requested_at timestamp with time zone NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    status text DEFAULT 'open'::text NOT NULL,
    answered_by text,
    answered_at timestamp with time zone,
    CONSTRAINT letter_requests_action CHECK ((action = ANY (ARRAY['replay'::text, 'discard'::text]))),
    CONSTRAINT letter_requests_four_eyes CHECK (((status <> 'confirmed'::text) OR ((answered_by IS NOT NULL) AND (answered_by <> requested_by)))),
    CONSTRAINT letter_requests_status CHECK ((status = ANY (ARRAY['open'::text, 'confirmed'::text, 'withdrawn'::text])))
);

ALTER TABLE ONLY public.letter_requests FORCE ROW LEVEL SECURITY;

CREATE TABLE public.memberships (
    user_id text NOT NULL,
    tenant text NOT NULL,
    role text NOT NULL,
    granted_by text NOT NULL,
    granted_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT memberships_role CHECK ((role = ANY (ARRAY['ADMIN'::text, 'ANALYST'::text, 'APPROVER'::text, 'VIEWER'::text])))
);

CREATE TABLE public.outbox (
    tenant text NOT NULL,
    message_id text NOT NULL,
    exchange text NOT NULL,
    routing_key text NOT NULL,
    headers jsonb DEFAULT '{}'::jsonb NOT NULL,
    body bytea NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    "position" bigint NOT NULL,
    content_type text DEFAULT 'application/octet-stream'::text NOT NULL,
    correlation_id text,
    mandatory boolean DEFAULT true NOT NULL,
    due_at timestamp with time zone
);

ALTER TABLE ONLY public.outbox FORCE ROW LEVEL SECURITY;

ALTER TABLE public.outbox ALTER COLUMN "position" ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.outbox_position_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.pauses (
    tenant text NOT NULL,
    place text NOT NULL,
    reason text NOT NULL,
    set_by text NOT NULL,
    set_at timestamp with time zone NOT NULL,
    until timestamp with time zone,
    CONSTRAINT pauses_place CHECK (((tenant = '*'::text) = (place <> 'doors'::text)))
);

ALTER TABLE ONLY public.pauses FORCE ROW LEVEL SECURITY;

CREATE TABLE public.probes (
    partition integer NOT NULL,
    sent_at timestamp with time zone NOT NULL,
    left_at timestamp with time zone NOT NULL
);

CREATE TABLE public.registry_activations (
    id bigint NOT NULL,
    tenant text NOT NULL,
    kind text NOT NULL,
    scope_key text NOT NULL,
    action text NOT NULL,
    name text,
    version integer,
    activated_by text NOT NULL,
    reason text NOT NULL,
    activated_at timestamp with time zone NOT NULL,
    CONSTRAINT registry_activations_action CHECK ((action = ANY (ARRAY['activate'::text, 'rollback'::text]))),
    CONSTRAINT registry_activations_version CHECK (((num_nulls(name, version) = 0) OR ((num_nulls(name, version) = 2) AND (action = 'rollback'::text))))
);

ALTER TABLE ONLY public.registry_activations FORCE ROW LEVEL SECURITY;

ALTER TABLE public.registry_activations ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.registry_activations_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE public.registry_active (
    tenant text NOT NULL,
    kind text NOT NULL,
    scope_key text NOT NULL,
    name text NOT NULL,
    version integer NOT NULL,
    activated_at timestamp with time zone DEFAULT now() NOT NULL,
    activated_by text DEFAULT ''::text NOT NULL
);

ALTER TABLE ONLY public.registry_active FORCE ROW LEVEL SECURITY;

CREATE TABLE public.registry_approvals (
    tenant text NOT NULL,
    kind text NOT NULL,
    name text NOT NULL,
    version integer NOT NULL,
    digest text NOT NULL,
    approver text NOT NULL,
    reason text NOT NULL,
    approved_at timestamp with time zone NOT NULL,
    CONSTRAINT registry_approvals_person CHECK ((approver <> ''::text))
);

ALTER TABLE ONLY public.registry_approvals FORCE ROW LEVEL SECURITY;

CREATE TABLE public.registry_transitions (
    from_status text NOT NULL,
    to_status text NOT NULL
);

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
    owner text DEFAULT ''::text NOT NULL,
    purpose text DEFAULT ''::text NOT NULL,
    use_tag text DEFAULT 'fraud'::text NOT NULL,
    limitations text DEFAULT ''::text NOT NULL,
    evidence jsonb DEFAULT '{}'::jsonb NOT NULL,
    validator text,
    valid_until timestamp with time zone,
    submitted_at timestamp with time zone,
    signature bytea,
    key_id text,
    CONSTRAINT registry_versions_approved CHECK (((status <> ALL (ARRAY['approved'::text, 'active'::text])) OR ((approver IS NOT NULL) AND (approved_at IS NOT NULL)))),
    CONSTRAINT registry_versions_content CHECK ((digest = encode(sha256(content), 'hex'::text))),
    CONSTRAINT registry_versions_four_eyes CHECK ((approver <> author)),
    CONSTRAINT registry_versions_kind CHECK ((kind = ANY (ARRAY['model'::text, 'prompt'::text, 'policy'::text, 'guardrail'::text, 'lists'::text, 'reasons'::text, 'trial'::text]))),
    CONSTRAINT registry_versions_persons CHECK (((author <> ''::text) AND (approver <> ''::text))),
    CONSTRAINT registry_versions_status CHECK ((status = ANY (ARRAY['draft'::text, 'submitted'::text, 'approved'::text, 'active'::text, 'rejected'::text, 'retired'::text, 'revoked'::text]))),
    CONSTRAINT registry_versions_use CHECK ((use_tag = ANY (ARRAY['fraud'::text, 'aml'::text, 'credit'::text]))),
    CONSTRAINT registry_versions_validator CHECK ((validator <> author))
);

ALTER TABLE ONLY public.registry_versions FORCE ROW LEVEL SECURITY;

CREATE TABLE public.replay_pace (
    id integer NOT NULL,
    next_due_at timestamp with time zone NOT NULL,
    CONSTRAINT replay_pace_one CHECK ((id = 1))
);

CREATE TABLE public.tenants (
    tenant_id text NOT NULL,
    name text NOT NULL,
    broker_user text,
    thresholds jsonb DEFAULT '{}'::jsonb NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    status text DEFAULT 'active'::text NOT NULL,
    approval_policy jsonb DEFAULT '{}'::jsonb NOT NULL,
    limits jsonb DEFAULT '{}'::jsonb NOT NULL,
    CONSTRAINT tenants_id CHECK ((tenant_id ~ '^[a-z0-9][a-z0-9-]{0,62}$'::text)),
    CONSTRAINT tenants_status CHECK ((status = ANY (ARRAY['active'::text, 'suspended'::text])))
);

CREATE TABLE public.users (
    user_id text NOT NULL,
    name text NOT NULL,
    password_hash text,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    disabled_at timestamp with time zone,
    oidc_issuer text,
    oidc_subject text,
    tokens_valid_from timestamp with time zone,
    failed_logins integer DEFAULT 0 NOT NULL,
    locked_until timestamp with time zone,
    CONSTRAINT users_id CHECK ((user_id ~ '^[a-z0-9][a-z0-9._@-]{0,126}$'::text))
);

ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_pkey PRIMARY KEY (key_id);

ALTER TABLE ONLY public.approval_votes
    ADD CONSTRAINT approval_votes_pkey PRIMARY KEY (tenant, event_id, revision, person);

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

ALTER TABLE ONLY public.halts
    ADD CONSTRAINT halts_pkey PRIMARY KEY (tenant, model);

ALTER TABLE ONLY public.imported_history
    ADD CONSTRAINT imported_history_pkey PRIMARY KEY (tenant, source, part);

ALTER TABLE ONLY public.labels
    ADD CONSTRAINT labels_pkey PRIMARY KEY (tenant, label_id);

ALTER TABLE ONLY public.layouts
    ADD CONSTRAINT layouts_pkey PRIMARY KEY (version);

ALTER TABLE ONLY public.letter_history
    ADD CONSTRAINT letter_history_pkey PRIMARY KEY (tenant, letter_id, number);

ALTER TABLE ONLY public.letter_requests
    ADD CONSTRAINT letter_requests_pkey PRIMARY KEY (tenant, request_id);

ALTER TABLE ONLY public.memberships
    ADD CONSTRAINT memberships_pkey PRIMARY KEY (user_id, tenant, role);

ALTER TABLE ONLY public.outbox
    ADD CONSTRAINT outbox_pkey PRIMARY KEY (tenant, message_id);

ALTER TABLE ONLY public.pauses
    ADD CONSTRAINT pauses_pkey PRIMARY KEY (tenant, place);

ALTER TABLE ONLY public.probes
    ADD CONSTRAINT probes_pkey PRIMARY KEY (partition);

ALTER TABLE ONLY public.registry_activations
    ADD CONSTRAINT registry_activations_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.registry_active
    ADD CONSTRAINT registry_active_pkey PRIMARY KEY (kind, tenant, scope_key);

ALTER TABLE ONLY public.registry_approvals
    ADD CONSTRAINT registry_approvals_pkey PRIMARY KEY (kind, tenant, name, version);

ALTER TABLE ONLY public.registry_transitions
    ADD CONSTRAINT registry_transitions_pkey PRIMARY KEY (from_status, to_status);

ALTER TABLE ONLY public.registry_versions
    ADD CONSTRAINT registry_versions_exact UNIQUE (kind, tenant, name, version, digest);

ALTER TABLE ONLY public.registry_versions
    ADD CONSTRAINT registry_versions_pkey PRIMARY KEY (kind, tenant, name, version);

ALTER TABLE ONLY public.replay_pace
    ADD CONSTRAINT replay_pace_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.tenants
    ADD CONSTRAINT tenants_broker_user UNIQUE (broker_user);

ALTER TABLE ONLY public.tenants
    ADD CONSTRAINT tenants_pkey PRIMARY KEY (tenant_id);

ALTER TABLE ONLY public.users
    ADD CONSTRAINT users_oidc UNIQUE (oidc_issuer, oidc_subject);

ALTER TABLE ONLY public.users
    ADD CONSTRAINT users_pkey PRIMARY KEY (user_id);

CREATE INDEX api_keys_by_tenant ON public.api_keys USING btree (tenant);

CREATE INDEX approvals_expiring ON public.approvals USING btree (expires_at) WHERE (status = 'open'::text);

CREATE INDEX approvals_open ON public.approvals USING btree (tenant, opened_at) WHERE (status = 'open'::text);

CREATE INDEX audit_records_event ON public.audit_records USING btree (tenant, event_id);

CREATE INDEX dead_letters_event ON public.dead_letters USING btree (tenant, event_id);

CREATE INDEX dead_letters_group ON public.dead_letters USING btree (tenant, fingerprint, parked_at);

CREATE INDEX dead_letters_open ON public.dead_letters USING btree (tenant, parked_at) WHERE (status = 'open'::text);

CREATE INDEX decisions_corrects ON public.decisions USING btree (tenant, corrects) WHERE (corrects IS NOT NULL);

CREATE INDEX decisions_decided ON public.decisions USING btree (tenant, decided_at, event_id);

CREATE INDEX decisions_feed ON public.decisions USING btree (tenant, feed_xid, event_id, revision);

CREATE INDEX events_received ON public.events USING btree (tenant, received_at);

CREATE INDEX events_subject ON public.events USING btree (tenant, subject_type, subject_id, occurred_at);

CREATE INDEX labels_event ON public.labels USING btree (tenant, event_id);

CREATE INDEX letter_history_person ON public.letter_history USING btree (tenant, person, at);

CREATE INDEX letter_history_request ON public.letter_history USING btree (tenant, request_id) WHERE (request_id IS NOT NULL);

CREATE INDEX outbox_position ON public.outbox USING btree ("position");

CREATE INDEX registry_activations_place ON public.registry_activations USING btree (tenant, kind, scope_key, id);

CREATE INDEX registry_versions_digest ON public.registry_versions USING btree (digest);

CREATE TRIGGER forward_only BEFORE UPDATE ON public.audit_heads FOR EACH ROW EXECUTE FUNCTION public.rf_forward_only();

ALTER TABLE public.audit_heads ENABLE ALWAYS TRIGGER forward_only;

CREATE TRIGGER gate BEFORE INSERT OR UPDATE ON public.registry_active FOR EACH ROW EXECUTE FUNCTION public.rf_registry_active();

ALTER TABLE public.registry_active ENABLE ALWAYS TRIGGER gate;

CREATE TRIGGER gate BEFORE INSERT ON public.registry_approvals FOR EACH ROW EXECUTE FUNCTION public.rf_registry_approval();

ALTER TABLE public.registry_approvals ENABLE ALWAYS TRIGGER gate;

CREATE TRIGGER gate BEFORE INSERT OR UPDATE ON public.registry_versions FOR EACH ROW EXECUTE FUNCTION public.rf_registry_version();

ALTER TABLE public.registry_versions ENABLE ALWAYS TRIGGER gate;

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

ALTER TABLE ONLY public.approval_votes
    ADD CONSTRAINT approval_votes_approval FOREIGN KEY (tenant, event_id, revision) REFERENCES public.approvals(tenant, event_id, revision);

ALTER TABLE ONLY public.memberships
    ADD CONSTRAINT memberships_user FOREIGN KEY (user_id) REFERENCES public.users(user_id);

ALTER TABLE ONLY public.registry_active
    ADD CONSTRAINT registry_active_version FOREIGN KEY (kind, tenant, name, version) REFERENCES public.registry_versions(kind, tenant, name, version);

ALTER TABLE ONLY public.registry_approvals
    ADD CONSTRAINT registry_approvals_exact FOREIGN KEY (kind, tenant, name, version, digest) REFERENCES public.registry_versions(kind, tenant, name, version, digest);

ALTER TABLE public.approval_votes ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.approvals ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.audit_checkpoints ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.audit_heads ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.audit_records ENABLE ROW LEVEL SECURITY;

CREATE POLICY by_digest ON public.registry_versions FOR SELECT USING ((digest = ANY (( SELECT public.rf_digests() AS rf_digests)::text[])));

ALTER TABLE public.dead_letters ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.decisions ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.events ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.halts ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.imported_history ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.labels ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.letter_history ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.letter_requests ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.outbox ENABLE ROW LEVEL SECURITY;

CREATE POLICY own_tenants ON public.approval_votes USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.approvals USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.audit_checkpoints USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.audit_heads USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.audit_records USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.dead_letters USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.decisions USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.events USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.halts USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.imported_history USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.labels USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.letter_history USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.letter_requests USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.outbox USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.pauses USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.registry_activations USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.registry_active USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.registry_approvals USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

CREATE POLICY own_tenants ON public.registry_versions USING (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[]))) WITH CHECK (((tenant COLLATE "C") = ANY (( SELECT public.rf_tenants() AS rf_tenants)::text[])));

ALTER TABLE public.pauses ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.registry_activations ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.registry_active ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.registry_approvals ENABLE ROW LEVEL SECURITY;

ALTER TABLE public.registry_versions ENABLE ROW LEVEL SECURITY;

CREATE POLICY shared ON public.halts FOR SELECT USING ((tenant = '*'::text));

CREATE POLICY shared ON public.pauses FOR SELECT USING ((tenant = '*'::text));

CREATE POLICY shared ON public.registry_activations FOR SELECT USING ((tenant = '*'::text));

CREATE POLICY shared ON public.registry_active FOR SELECT USING ((tenant = '*'::text));

CREATE POLICY shared ON public.registry_approvals FOR SELECT USING ((tenant = '*'::text));

CREATE POLICY shared ON public.registry_versions FOR SELECT USING ((tenant = '*'::text));

GRANT USAGE ON SCHEMA public TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.api_keys TO riskfleet_app;

GRANT UPDATE(revoked_at) ON TABLE public.api_keys TO riskfleet_app;

GRANT UPDATE(expires_at) ON TABLE public.api_keys TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.approval_votes TO riskfleet_app;

GRANT SELECT,INSERT,UPDATE ON TABLE public.approvals TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.audit_checkpoints TO riskfleet_app;

GRANT SELECT,INSERT,UPDATE ON TABLE public.audit_heads TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.audit_records TO riskfleet_app;

GRANT SELECT,INSERT,UPDATE ON TABLE public.dead_letters TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.decisions TO riskfleet_app;

GRANT UPDATE(superseded_by) ON TABLE public.decisions TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.events TO riskfleet_app;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.halts TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.imported_history TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.labels TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.layouts TO riskfleet_app;

GRANT UPDATE(retired_at) ON TABLE public.layouts TO riskfleet_app;

GRANT UPDATE(removed_at) ON TABLE public.layouts TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.letter_history TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.letter_requests TO riskfleet_app;

GRANT UPDATE(expires_at) ON TABLE public.letter_requests TO riskfleet_app;

GRANT UPDATE(status) ON TABLE public.letter_requests TO riskfleet_app;

GRANT UPDATE(answered_by) ON TABLE public.letter_requests TO riskfleet_app;

GRANT UPDATE(answered_at) ON TABLE public.letter_requests TO riskfleet_app;

GRANT SELECT,INSERT,DELETE ON TABLE public.memberships TO riskfleet_app;

GRANT SELECT,INSERT,DELETE ON TABLE public.outbox TO riskfleet_app;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.pauses TO riskfleet_app;

GRANT SELECT,INSERT,UPDATE ON TABLE public.probes TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.registry_activations TO riskfleet_app;

GRANT SELECT,INSERT,DELETE ON TABLE public.registry_active TO riskfleet_app;

GRANT UPDATE(name) ON TABLE public.registry_active TO riskfleet_app;

GRANT UPDATE(version) ON TABLE public.registry_active TO riskfleet_app;

GRANT UPDATE(activated_at) ON TABLE public.registry_active TO riskfleet_app;

GRANT UPDATE(activated_by) ON TABLE public.registry_active TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.registry_approvals TO riskfleet_app;

GRANT SELECT ON TABLE public.registry_transitions TO riskfleet_app;

GRANT SELECT,INSERT ON TABLE public.registry_versions TO riskfleet_app;

GRANT UPDATE(status) ON TABLE public.registry_versions TO riskfleet_app;

GRANT UPDATE(approver) ON TABLE public.registry_versions TO riskfleet_app;

GRANT UPDATE(approved_at) ON TABLE public.registry_versions TO riskfleet_app;

GRANT UPDATE(submitted_at) ON TABLE public.registry_versions TO riskfleet_app;

GRANT UPDATE(signature) ON TABLE public.registry_versions TO riskfleet_app;

GRANT UPDATE(key_id) ON TABLE public.registry_versions TO riskfleet_app;

GRANT SELECT ON TABLE public.replay_pace TO riskfleet_app;

GRANT UPDATE(next_due_at) ON TABLE public.replay_pace TO riskfleet_app;

GRANT SELECT,INSERT,UPDATE ON TABLE public.tenants TO riskfleet_app;

GRANT SELECT,INSERT,UPDATE ON TABLE public.users TO riskfleet_app;
