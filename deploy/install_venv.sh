#!/bin/sh
# Debian ships Python without venv. Install the missing package where that is allowed (root or sudo, and a yes on the
# terminal or YES=1); otherwise say what to do.
set -eu
python="$1"
package="$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
advice="Python's venv module is missing; as root: apt-get install $package, then repeat"
sudo=""
if ! command -v apt-get >/dev/null; then echo "Python's venv module is missing; install it" >&2; exit 1; fi
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "$advice" >&2; exit 1; }
  sudo="sudo"
fi
if [ "${YES:-}" != 1 ]; then
  [ -t 0 ] || { echo "$advice (or set YES=1)" >&2; exit 1; }
  printf "Install %s with apt-get now? [Y/n] " "$package"
  read -r answer
  case "$answer" in ""|y|Y|yes) ;; *) echo "$advice" >&2; exit 1 ;; esac
fi
echo "installing $package with apt-get"
$sudo apt-get -qq update || true
$sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "$package" >/dev/null
