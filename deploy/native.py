"""One private RabbitMQ, Redis and PostgreSQL as plain processes: how each is found, prepared, started and asked.

Promises: every server listens on 127.0.0.1 only, demands a random password, writes below the directory it is given
(PostgreSQL below `/var/tmp` where its account cannot reach that directory) and may be killed at any moment and started
again on the same port and data. Does not promise: anything beyond Linux, nor a server for production; it neither
restarts nor orders the servers, which `deploy.servers` does.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.processes import HOST, Record, ServersError, identify, port_is_free, send_signal, write_private

_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Binaries:
    """Absolute paths of the programs that the three servers need."""

    rabbitmq_server: Path
    epmd: Path
    redis_server: Path
    postgresql_bin: Path


def find_binaries(
    search_path: str | None = None,
    rabbitmq_dirs: Sequence[Path] = (Path("/usr/lib/rabbitmq/bin"), Path("/opt/rabbitmq/sbin")),
    postgresql_root: Path = Path("/usr/lib/postgresql"),
) -> tuple[Binaries | None, list[str]]:
    """Look for the servers' programs; answer them, or None and the Debian packages that bring the missing ones."""
    path = search_path if search_path is not None else os.environ.get("PATH", "") + ":" + _SYSTEM_PATH
    # Debian's /usr/sbin/rabbitmq-server changes user and HOME, so the program behind it is looked for first.
    rabbitmq = next((d / "rabbitmq-server" for d in rabbitmq_dirs if (d / "rabbitmq-server").exists()), None)
    if rabbitmq is None and (found := shutil.which("rabbitmq-server", path=path)):
        rabbitmq = None if Path(found).resolve().name == "rabbitmq-script-wrapper" else Path(found)
    epmd = shutil.which("epmd", path=path)
    redis = shutil.which("redis-server", path=path)
    postgresql = find_postgresql(path, postgresql_root)
    wanted = (("rabbitmq-server", rabbitmq and epmd), ("redis-server", redis), ("postgresql", postgresql))
    missing = [package for package, program in wanted if not program]
    if missing or rabbitmq is None or epmd is None or redis is None or postgresql is None:
        return None, missing
    return Binaries(rabbitmq, Path(epmd), Path(redis), postgresql), []


def find_postgresql(path: str, root: Path) -> Path | None:
    """The directory of the newest complete PostgreSQL server below `root` (`<version>/bin`), else one on `path`.

    Complete means `initdb` and `postgres` side by side: a lone `postgres` on PATH can be a link or a client's stub.
    """
    candidates = sorted(root.glob("*/bin"), key=lambda b: _version_key(b.parent.name), reverse=True)
    candidates += [Path(entry) for entry in path.split(":") if entry]
    for candidate in candidates:
        if all(os.access(candidate / program, os.X_OK) for program in ("initdb", "postgres", "psql", "pg_isready")):
            return candidate
    return None


def _version_key(name: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in name.split("."))


def _environment(home: Path, **more: str) -> dict[str, str]:
    return {"PATH": _SYSTEM_PATH, "HOME": str(home), "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"} | more


class RedisServer:
    """Redis with an append-only file and no eviction."""

    name, ports, stop_signal = "redis", ("redis",), signal.SIGTERM

    def __init__(self, binaries: Binaries, record: Record, directory: Path) -> None:
        self._binary, self._record, self._dir = binaries.redis_server, record, directory

    def prepare(self) -> None:
        """Write the configuration; the password is in the file, never on a command line."""
        settings = (
            f"bind {HOST}",
            f"port {self._record.port('redis')}",
            f"requirepass {self._record.secret('redis')}",
            f'dir "{self._dir}"',
            "daemonize no",
            "appendonly yes",
            "appendfsync everysec",
            "maxmemory-policy noeviction",
            "tcp-backlog 128",
            'save ""',
        )
        write_private(self._dir / "redis.conf", "\n".join(settings) + "\n")

    def command(self) -> list[str]:
        """`redis-server` with our configuration."""
        return [str(self._binary), str(self._dir / "redis.conf")]

    def environment(self) -> Mapping[str, str]:
        """Nothing special."""
        return _environment(self._dir)

    def ready(self) -> bool:
        """PONG, which Redis refuses while it still loads its file."""
        try:
            with socket.create_connection((HOST, self._record.port("redis")), _PROBE_TIMEOUT_S) as connection:
                connection.sendall(f"AUTH {self._record.secret('redis')}\r\nPING\r\nQUIT\r\n".encode())
                answer = b""
                while chunk := connection.recv(256):
                    answer += chunk
            return b"+PONG" in answer
        except OSError:
            return False


class RabbitServer:
    """RabbitMQ with the management plugin, its own node name, cookie and port mapper (epmd)."""

    name, ports, stop_signal = "rabbitmq", ("rabbitmq", "rabbitmq_management", "rabbitmq_dist", "epmd"), signal.SIGTERM

    def __init__(self, binaries: Binaries, record: Record, directory: Path) -> None:
        self._binaries, self._record, self._dir = binaries, record, directory
        self._epmd: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Write configuration, plugin list and cookie, and start our own epmd when it does not run."""
        for name in ("home", "mnesia", "logs"):
            (self._dir / name).mkdir(exist_ok=True)
        settings = (
            f"listeners.tcp.default = {HOST}:{self._record.port('rabbitmq')}",
            f"management.tcp.ip = {HOST}",
            f"management.tcp.port = {self._record.port('rabbitmq_management')}",
            "default_user = riskfleet",
            f"default_pass = {self._record.secret('rabbitmq')}",
            "default_user_tags.administrator = true",
            "vm_memory_high_watermark.relative = 0.3",
            "disk_free_limit.absolute = 50MB",
            "heartbeat = 10",
        )
        write_private(self._dir / "rabbitmq.conf", "\n".join(settings) + "\n")
        advanced = Path(__file__).parent / "rabbitmq" / "advanced.config"
        write_private(self._dir / "advanced.config", advanced.read_text())
        write_private(self._dir / "enabled_plugins", "[rabbitmq_management].\n")
        write_private(self._dir / "rabbitmq-env.conf", "")
        write_private(self._dir / "home" / ".erlang.cookie", self._record.secret("erlang_cookie"), 0o400)
        self._start_epmd()

    def _start_epmd(self) -> None:
        # Erlang would start a daemon of its own, whose pid nobody learns and which stays behind for ever.
        if self._record.process("epmd") is not None:
            return
        self._epmd = subprocess.Popen(
            [str(self._binaries.epmd), "-port", str(self._record.port("epmd")), "-address", HOST],
            env=_environment(self._dir / "home"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        self._record.remember_process("epmd", identify(self._epmd.pid))
        deadline = time.monotonic() + 3.0
        while port_is_free(self._record.port("epmd")) and time.monotonic() < deadline:
            time.sleep(0.02)

    def stop_epmd(self) -> None:
        """End our epmd; to be called when the node is gone."""
        if (process := self._record.process("epmd")) is not None:
            send_signal(process.pid, signal.SIGTERM)
        if self._epmd is not None:
            self._epmd.wait(5.0)
            self._epmd = None
        self._record.remember_process("epmd", None)

    def command(self) -> list[str]:
        """The program behind Debian's wrapper, which would switch user and HOME."""
        return [str(self._binaries.rabbitmq_server)]

    def environment(self) -> Mapping[str, str]:
        """Everything that would else collide with another node on this machine."""
        loopback = "-kernel inet_dist_use_interface {127,0,0,1}"
        node = self._record.note("rabbitmq_node") or f"riskfleet-{secrets.token_hex(4)}@localhost"
        self._record.remember("rabbitmq_node", node)
        return _environment(
            self._dir / "home",
            RABBITMQ_NODENAME=node,
            RABBITMQ_NODE_IP_ADDRESS=HOST,
            RABBITMQ_NODE_PORT=str(self._record.port("rabbitmq")),
            RABBITMQ_DIST_PORT=str(self._record.port("rabbitmq_dist")),
            ERL_EPMD_PORT=str(self._record.port("epmd")),
            ERL_EPMD_ADDRESS=HOST,
            RABBITMQ_MNESIA_BASE=str(self._dir / "mnesia"),
            RABBITMQ_LOG_BASE=str(self._dir / "logs"),
            RABBITMQ_LOGS="-",
            RABBITMQ_CONFIG_FILE=str(self._dir / "rabbitmq.conf"),
            RABBITMQ_ADVANCED_CONFIG_FILE=str(self._dir / "advanced.config"),
            RABBITMQ_ENABLED_PLUGINS_FILE=str(self._dir / "enabled_plugins"),
            RABBITMQ_CONF_ENV_FILE=str(self._dir / "rabbitmq-env.conf"),
            # "Allow input" makes the start script exec Erlang instead of waiting for it, so that the pid we hold is
            # the server's; -noinput then takes the input away again.
            RABBITMQ_ALLOW_INPUT="1",
            RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=f"-noinput {loopback}",
            RABBITMQ_CTL_ERL_ARGS=loopback,
        )

    def ready(self) -> bool:
        """AMQP is spoken and the management API knows our user."""
        try:
            with socket.create_connection((HOST, self._record.port("rabbitmq")), _PROBE_TIMEOUT_S) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                if connection.recv(1) != b"\x01":
                    return False
            login = base64.b64encode(f"riskfleet:{self._record.secret('rabbitmq')}".encode()).decode()
            http_port = self._record.port("rabbitmq_management")
            connection_http = http.client.HTTPConnection(HOST, http_port, timeout=_PROBE_TIMEOUT_S)
            try:
                connection_http.request("GET", "/api/whoami", headers={"Authorization": f"Basic {login}"})
                return connection_http.getresponse().status == 200
            finally:
                connection_http.close()
        except (OSError, http.client.HTTPException):
            return False


class PostgresServer:
    """PostgreSQL with scram passwords and full durability; one role migrates and owns, the application owns nothing."""

    name, ports, stop_signal = "postgresql", ("postgresql",), signal.SIGINT  # SIGINT is PostgreSQL's fast shutdown

    def __init__(self, binaries: Binaries, record: Record, directory: Path) -> None:
        self._bin, self._record, self._wanted = binaries.postgresql_bin, record, directory

    @property
    def _as_server_user(self) -> list[str]:
        # PostgreSQL refuses to run as root; the package's own account is there wherever the package is.
        if os.geteuid() != 0:
            return []
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--"]

    @property
    def _home(self) -> Path:
        return Path(self._record.note("postgresql_dir") or self._wanted)

    def prepare(self) -> None:
        """Create the cluster at first use, and clear a lock file that names a process which is no PostgreSQL."""
        if self._record.note("postgresql_dir") is None:
            self._record.remember("postgresql_dir", str(self._choose_directory()))
        if not (self._home / "data").exists():
            self._initialise()
        lock = self._home / "data" / "postmaster.pid"
        if lock.exists():
            pid = lock.read_text().split("\n", 1)[0]
            command = Path(f"/proc/{pid}/comm")
            # After a reboot the number may belong to anybody, and PostgreSQL would wait for that process for ever.
            # With a dead pid the file stays: PostgreSQL finds orphaned children through it.
            if command.exists() and command.read_text().strip() != "postgres":
                lock.unlink()

    def _choose_directory(self) -> Path:
        if os.geteuid() != 0:
            self._wanted.mkdir(mode=0o700, exist_ok=True)
            return self._wanted
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            message = "PostgreSQL does not run as root and there is no account `postgres`; run as another user"
            raise ServersError(message) from None
        directory = self._wanted
        test = [*self._as_server_user, "test", "-x", str(directory.parent)]
        if subprocess.run(test, cwd="/", check=False, capture_output=True).returncode != 0:
            # A clone in the home of root, for one, cannot be entered by that account.
            digest = hashlib.sha256(str(directory).encode()).hexdigest()[:12]
            directory = Path("/var/tmp") / f"riskfleet-{digest}"  # noqa: S108 - owner and mode are checked below
            self._discard_orphan(directory, account.pw_uid)
        directory.mkdir(mode=0o700, exist_ok=True)
        os.chown(directory, account.pw_uid, account.pw_gid)
        return directory

    @staticmethod
    def _discard_orphan(directory: Path, uid: int) -> None:
        """Remove the data of an earlier data directory of the same name: its passwords went with its record."""
        if not directory.exists() and not directory.is_symlink():
            return
        if directory.is_symlink() or directory.stat().st_uid not in (0, uid):
            raise ServersError(f"{directory} is needed for PostgreSQL's data but belongs to somebody else; remove it")
        lock = directory / "data" / "postmaster.pid"
        pid = lock.read_text().split("\n", 1)[0] if lock.exists() else ""
        if pid.isdigit() and identify(int(pid)) is not None:
            raise ServersError(f"a PostgreSQL without record still runs in {directory}: kill -INT {pid}, start again")
        shutil.rmtree(directory)

    def _initialise(self) -> None:
        fresh = self._home / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        password = self._home / "superuser"
        write_private(password, self._record.secret("postgresql_superuser"))
        if os.geteuid() == 0:
            os.chown(password, pwd.getpwnam("postgres").pw_uid, -1)
        arguments = ("--username=postgres", f"--pwfile={password}", "--auth-host=scram-sha-256", "--auth-local=reject")
        self._run("initdb", "-D", str(fresh), *arguments, "--encoding=UTF8", "--locale=C.UTF-8", "--data-checksums")
        password.unlink()
        fresh.rename(self._home / "data")  # the name stands for "complete"

    def _run(self, program: str, *arguments: str, script: str | None = None) -> None:
        environment = _environment(self._home, PGPASSWORD=self._record.secret("postgresql_superuser"))
        result = subprocess.run(
            [*self._as_server_user, str(self._bin / program), *arguments],
            input=script,
            stdin=subprocess.DEVNULL if script is None else None,
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60.0,
            check=False,
        )
        if result.returncode != 0:
            raise ServersError(f"{program} failed: {result.stderr.strip()[-800:]}")

    def command(self) -> list[str]:
        """`postgres` itself (not pg_ctl, which would hide its pid); setpriv execs it."""
        settings = {
            "listen_addresses": HOST,
            "port": str(self._record.port("postgresql")),
            "unix_socket_directories": "",
            "max_connections": "100",
            "shared_buffers": "64MB",
            "password_encryption": "scram-sha-256",
            "fsync": "on",
            "synchronous_commit": "on",
            "log_timezone": "UTC",
            "timezone": "UTC",
        }
        options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        return [*self._as_server_user, str(self._bin / "postgres"), "-D", str(self._home / "data"), *options]

    def environment(self) -> Mapping[str, str]:
        """Nothing special."""
        return _environment(self._home)

    def ready(self) -> bool:
        """Connections are accepted, and the two roles and the database are there."""
        port = str(self._record.port("postgresql"))
        probe = [str(self._bin / "pg_isready"), "-q", "-h", HOST, "-p", port, "-t", "2"]
        if subprocess.run(probe, env=_environment(self._home), cwd="/", check=False).returncode != 0:
            return False
        if self._record.note("postgresql_roles") is None:
            connection = ("-X", "-q", "-v", "ON_ERROR_STOP=1", "-h", HOST, "-p", port, "-U", "postgres")
            self._run("psql", *connection, "postgres", script=self._roles())
            self._record.remember("postgresql_roles", "made")
        return True

    def _roles(self) -> str:
        """SQL that may be run twice: a start can be killed between its statements."""
        owner, app = self._record.secret("postgresql_owner"), self._record.secret("postgresql_app")
        # Hexadecimal passwords of our own making; ALTER ROLE takes no parameters.
        return f"""
SELECT 'CREATE ROLE ' || name FROM (VALUES ('riskfleet_owner'), ('riskfleet_app')) AS roles (name)
 WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \\gexec
ALTER ROLE riskfleet_owner LOGIN CREATEROLE NOSUPERUSER NOBYPASSRLS PASSWORD '{owner}';
ALTER ROLE riskfleet_app LOGIN NOCREATEROLE NOSUPERUSER NOBYPASSRLS PASSWORD '{app}';
SELECT 'CREATE DATABASE riskfleet OWNER riskfleet_owner'
 WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'riskfleet') \\gexec
REVOKE ALL ON DATABASE riskfleet FROM PUBLIC;
GRANT CONNECT, TEMPORARY ON DATABASE riskfleet TO riskfleet_app;
"""  # noqa: S608
