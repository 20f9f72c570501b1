#!/usr/bin/env bash
# Finds the Chromium that tests of the web page drive; where it is missing and this is root on Debian, installs it.
set -uo pipefail

for name in chromium chromium-browser google-chrome; do
  command -v $name >/dev/null && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "chromium: installing Debian's package, for tests of the web page"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null &&
    command -v chromium >/dev/null && exit 0
fi
echo "chromium: no Chromium is on the PATH; tests of the web page need it: apt-get install chromium, as root" >&2
# Elsewhere these tests are skipped.
[ "${CI:-}" != true ]
