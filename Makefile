# Builds, checks, tests and installs loopd. `make help` lists what there is.

PREFIX ?= /usr/local
bindir ?= $(PREFIX)/bin
libexecdir ?= $(PREFIX)/libexec
datadir ?= $(PREFIX)/share
mandir ?= $(datadir)/man
docdir ?= $(datadir)/doc/loopd
unitdir ?= $(PREFIX)/lib/systemd/system
dbusservicedir ?= $(datadir)/dbus-1/system-services
bashcompletiondir ?= $(datadir)/bash-completion/completions
zshcompletiondir ?= $(datadir)/zsh/site-functions
fishcompletiondir ?= $(datadir)/fish/vendor_completions.d
applicationsdir ?= $(datadir)/applications
servicemenudir ?= $(datadir)/kio/servicemenus
nautilusdir ?= $(datadir)/loopd/nautilus-scripts
# The bus and polkit read only these directories, independent of PREFIX.
dbuspolicydir ?= /usr/share/dbus-1/system.d
polkitactiondir ?= /usr/share/polkit-1/actions
# The same holds for some versions of udev.
udevrulesdir ?= /usr/lib/udev/rules.d
# umount looks in /sbin, which is this directory if /usr is merged.
mounthelperdir ?= /usr/sbin

CARGO ?= cargo
INSTALL ?= install
TARGET := $(or $(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET)/release

# Release builds contain no path of this machine.
FLAGS = RUSTFLAGS="$$(packaging/path-flags.sh)"

# cargo runs as the user who calls make; the host tests run as root.
ifneq ($(shell id -u),0)
KEEP := LOOPD_BIN,LOOPD_LOG,LOOPD_LOSETUP,LOOPD_LOSETUP_RECORD,LOOPD_TEST_LIMIT,LOOPD_TEST_ROUNDS,LOOPD_TEST_SEED,RUST_BACKTRACE
AS_ROOT := --config 'target."cfg(unix)".runner = ["sudo", "--preserve-env=$(KEEP)"]'
endif

# Which Debian `make test-vm` boots, and which of tests/vm/guest/parts* it runs there.
SUITE ?= bookworm
PARTS ?= parts
# What `make check-targets` checks: 64 bits, 32 bits, big endian.
TARGETS ?= aarch64-unknown-linux-gnu i686-unknown-linux-gnu s390x-unknown-linux-gnu
CARGO_DENY := 0.20.2
# The package's own revision.
REVISION ?= 1

.PHONY: all help bench-vm field safeguards mutants deps deps-packages deps-vm deps-targets set-up set-up-bench tools tools-packages tools-vm check check-targets deny docs test simulated simulate test-vm soak bench bench-hostile demo deb rpm check-packages install uninstall

all:
	$(FLAGS) $(CARGO) build --release -p loopd -p loopd-unlock -p loopctl

help:
	@echo "make              build in release mode"
	@echo "make install      install below PREFIX ($(PREFIX)) in DESTDIR; make first"
	@echo "make uninstall    remove what make install has installed"
	@echo "make demo         demonstration on a private bus"
	@echo "make test         unit tests, and the host tests as root; TESTS=text selects host tests"
	@echo "make test-vm      the system tests, in virtual machines with SUITE ($(SUITE)); TESTS as above;"
	@echo "                  PARTS=parts-release runs only the tests that depend on it"
	@echo "make deb, rpm     the packages, in $(TARGET)/package; REVISION ($(REVISION)) is theirs"
	@echo "make check-packages  check both packages"
	@echo "make simulate     serve the bus API on the session bus, without root and without devices"
	@echo "make soak         the long tests at full length, as root: about an hour; TESTS=part selects one"
	@echo "make safeguards   remove safeguards: the simulation must find each removal; ten minutes"
	@echo "make mutants      change the code: a test must find each change; hours, resumable"
	@echo "make bench        loopd beside losetup, UDisks2 and plain ioctls, as root: about six minutes; ROWS=\"attach growth\""
	@echo "                  selects parts (attach growth memory idle start sizes direct-io); JSON=file, SVG=file: the results"
	@echo "make field        cases that people have reported, row by row with the outcome, as root; ROWS=text selects"
	@echo "make bench-vm     measure opening an image beside other programs, in a virtual machine; ROUNDS"
	@echo "make bench-hostile  measure how much attacks of one user slow down another, as root"
	@echo "make check        formatting, lints, documentation, other targets, shipped files"
	@echo "make check-targets  cargo check for $(TARGETS)"
	@echo "make deny         advisories, licences and banned crates, with cargo-deny $(CARGO_DENY)"
	@echo "make docs         regenerate the manual pages and completions"
	@echo "make deps         install the required tools, on a Debian; demo and test do that themselves"
	@echo "make deps-packages, deps-vm, deps-targets  tools for packages, virtual machines, other targets"

deps:
	@tests/deps.sh

deps-packages:
	@tests/deps.sh packages

deps-vm:
	@tests/deps.sh packages vm

# Standard libraries of the targets, by rustup.
deps-targets: deps
	rustup target add $(TARGETS)

# demo and test install missing tools on a Debian; the others report them.
set-up:
	@tests/deps.sh set-up

tools:
	@tests/deps.sh look

# The benchmark installs what it compares with, on a Debian.
set-up-bench:
	@tests/deps.sh set-up bench

tools-packages:
	@tests/deps.sh look packages

tools-vm:
	@tests/deps.sh look vm

check: tools
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) clippy -p loopd --features simulate -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items
	tests/check-targets.sh $(TARGETS)
	$(CARGO) build -p loopd
	$(CARGO) run -q -p loopd-tests --bin loopd-docs -- --check
	tests/check-files.sh

# Other word sizes and byte orders, if their standard libraries are installed.
check-targets: tools
	tests/check-targets.sh $(TARGETS)

# cargo-deny fetches the database of advisories; without a network DENY="bans licenses sources" is the rest.
deny:
	@$(CARGO) deny --version 2>/dev/null | grep -qx 'cargo-deny $(CARGO_DENY)' || \
		$(CARGO) install --locked --version $(CARGO_DENY) cargo-deny
	$(CARGO) deny --workspace check $(DENY)

docs: tools
	$(CARGO) build -p loopd
	$(CARGO) run -q -p loopd-tests --bin loopd-docs

test: set-up
	$(MAKE) simulated
	$(CARGO) build --workspace --bins
	$(CARGO) test --workspace --exclude loopd-tests
	$(CARGO) test -p loopd-tests --lib --bins --test simulate
	$(CARGO) test -p loopd-tests --test host $(AS_ROOT) -- $(TESTS)

# loopd with a simulated kernel, under a name of its own.
simulated:
	$(CARGO) build -p loopd --features simulate
	mv $(TARGET)/debug/loopd $(TARGET)/debug/loopd-simulated

simulate: tools simulated
	$(TARGET)/debug/loopd-simulated --simulate

test-vm: tools-packages tools-vm all
	$(CARGO) build -p loopd-tests --bin loopd-probe
	PARTS=$(PARTS) tests/vm/run.sh $(SUITE) $(TARGET)/debug $(TESTS)

bench-vm: ROUNDS ?= 20
bench-vm: tools-packages tools-vm all
	$(CARGO) build -p loopd-tests --bin loopd-probe
	ROUNDS=$(ROUNDS) tests/vm/run.sh $(SUITE) $(TARGET)/debug opening_an_image_beside_peers

# MODULES: as tests/mutants.sh has them.
mutants:
	tests/mutants.sh $(MODULES)

safeguards:
	tests/safeguards.sh $(TESTS)

soak: tools
	$(CARGO) build --workspace --bins
	tests/soak.sh $(TESTS)

# ROWS: words from the kinds or inputs of the rows.
field: tools
	$(CARGO) build --workspace --bins
	$(CARGO) test -q -p loopd-tests --test field $(AS_ROOT) -- $(ROWS)

deb: tools-packages all
	packaging/deb.sh $(REVISION)

rpm: tools-packages all
	packaging/rpm.sh $(REVISION)

check-packages: tools-packages all
	packaging/check.sh

# ROWS: attach, growth, memory, idle, start, sizes, direct-io; all, unless some are named. JSON, SVG: where the
# figures and a plot of them are written. LOOPD_TEST_ROUNDS: the number of attaches.
bench: JSON ?= $(TARGET)/bench/peers.json
bench: SVG ?= $(TARGET)/bench/peers.svg
bench: set-up-bench all
	$(FLAGS) $(CARGO) build --release -p loopd-tests --bins
	mkdir -p $(dir $(JSON)) $(dir $(SVG))
	$(FLAGS) $(CARGO) bench -p loopd-tests --bench peers $(AS_ROOT) -- \
		--json $(abspath $(JSON)) --svg $(abspath $(SVG)) $(ROWS)

bench-hostile: tools all
	$(FLAGS) $(CARGO) build --release -p loopd-tests --bins
	$(FLAGS) $(CARGO) bench -p loopd-tests --bench hostile $(AS_ROOT)

demo: set-up
	$(CARGO) build -p loopd -p loopctl
	tests/demo.sh $(TARGET)/debug

# Does not build, so root needs no cargo.
install:
	@test -x $(RELEASE)/loopd && test -x $(RELEASE)/loopd-unlock && test -x $(RELEASE)/loopctl || { echo "not built yet: run make first" >&2; exit 1; }
	$(INSTALL) -D -m 755 $(RELEASE)/loopd $(DESTDIR)$(libexecdir)/loopd
	$(INSTALL) -D -m 755 $(RELEASE)/loopd-unlock $(DESTDIR)$(libexecdir)/loopd-unlock
	$(INSTALL) -D -m 755 $(RELEASE)/loopctl $(DESTDIR)$(bindir)/loopctl
	$(INSTALL) -d $(DESTDIR)$(libexecdir)/loopctl
	ln -srf $(DESTDIR)$(bindir)/loopctl $(DESTDIR)$(libexecdir)/loopctl/losetup
	$(INSTALL) -d $(DESTDIR)$(mounthelperdir)
	ln -srf $(DESTDIR)$(bindir)/loopctl $(DESTDIR)$(mounthelperdir)/umount.loopd
	$(INSTALL) -D -m 644 client/desktop/org.loopd1.open.desktop $(DESTDIR)$(applicationsdir)/org.loopd1.open.desktop
	$(INSTALL) -D -m 644 client/desktop/org.loopd1.servicemenu.desktop $(DESTDIR)$(servicemenudir)/org.loopd1.servicemenu.desktop
	$(INSTALL) -d $(DESTDIR)$(nautilusdir)
	$(INSTALL) -m 755 client/desktop/nautilus-scripts/* $(DESTDIR)$(nautilusdir)
	$(INSTALL) -D -m 644 client/desktop/thunar-uca.xml $(DESTDIR)$(docdir)/thunar-uca.xml
	$(INSTALL) -D -m 644 dbus/org.loopd1.conf $(DESTDIR)$(dbuspolicydir)/org.loopd1.conf
	$(INSTALL) -D -m 644 polkit/org.loopd1.policy $(DESTDIR)$(polkitactiondir)/org.loopd1.policy
	$(INSTALL) -d $(DESTDIR)$(dbusservicedir) $(DESTDIR)$(unitdir)
	sed 's#@LIBEXECDIR@#$(libexecdir)#g' dbus/org.loopd1.service.in > $(DESTDIR)$(dbusservicedir)/org.loopd1.service
	sed 's#@LIBEXECDIR@#$(libexecdir)#g' systemd/loopd.service.in > $(DESTDIR)$(unitdir)/loopd.service
	sed 's#@LIBEXECDIR@#$(libexecdir)#g' systemd/loop-image@.service.in > $(DESTDIR)$(unitdir)/loop-image@.service
	chmod 644 $(DESTDIR)$(dbusservicedir)/org.loopd1.service $(DESTDIR)$(unitdir)/loopd.service $(DESTDIR)$(unitdir)/loop-image@.service
	$(INSTALL) -D -m 755 systemd/loop-image $(DESTDIR)$(libexecdir)/loop-image
	$(INSTALL) -D -m 755 systemd/untrusted-loop $(DESTDIR)$(libexecdir)/untrusted-loop
	$(INSTALL) -d $(DESTDIR)$(udevrulesdir)
	sed 's#@LIBEXECDIR@#$(libexecdir)#g' systemd/63-untrusted-loop.rules.in > $(DESTDIR)$(udevrulesdir)/63-untrusted-loop.rules
	chmod 644 $(DESTDIR)$(udevrulesdir)/63-untrusted-loop.rules
	$(INSTALL) -D -m 644 systemd/66-loopd-cleartext.rules $(DESTDIR)$(udevrulesdir)/66-loopd-cleartext.rules
	$(INSTALL) -D -m 644 systemd/98-untrusted-loop.rules $(DESTDIR)$(udevrulesdir)/98-untrusted-loop.rules
	$(INSTALL) -D -m 644 systemd/partitions.conf $(DESTDIR)$(docdir)/partitions.conf
	$(INSTALL) -D -m 644 polkit/50-loopd-group.rules $(DESTDIR)$(docdir)/50-loopd-group.rules
	$(INSTALL) -D -m 644 docs/loopd.toml $(DESTDIR)$(docdir)/loopd.toml
	for xml in dbus/*.xml; do $(INSTALL) -D -m 644 $$xml $(DESTDIR)$(datadir)/dbus-1/interfaces/$${xml#dbus/} || exit; done
	$(INSTALL) -D -m 644 docs/completion/bash/loopctl $(DESTDIR)$(bashcompletiondir)/loopctl
	$(INSTALL) -D -m 644 docs/completion/zsh/_loopctl $(DESTDIR)$(zshcompletiondir)/_loopctl
	$(INSTALL) -D -m 644 docs/completion/fish/loopctl.fish $(DESTDIR)$(fishcompletiondir)/loopctl.fish
	for page in $(wildcard docs/*.[1-8] docs/man/*.[1-8]); do \
		$(INSTALL) -D -m 644 $$page $(DESTDIR)$(mandir)/man$${page##*.}/$${page##*/} || exit; done
	for text in README.md SECURITY.md LICENSE-MIT LICENSE-APACHE $(wildcard docs/*.md); do \
		$(INSTALL) -D -m 644 $$text $(DESTDIR)$(docdir)/$${text##*/} || exit; done

uninstall:
	rm -f $(DESTDIR)$(udevrulesdir)/63-untrusted-loop.rules $(DESTDIR)$(udevrulesdir)/98-untrusted-loop.rules
	rm -f $(DESTDIR)$(udevrulesdir)/66-loopd-cleartext.rules $(DESTDIR)$(libexecdir)/untrusted-loop
	rm -f $(DESTDIR)$(libexecdir)/loopd $(DESTDIR)$(libexecdir)/loopd-unlock $(DESTDIR)$(libexecdir)/loop-image $(DESTDIR)$(bindir)/loopctl
	rm -f $(DESTDIR)$(libexecdir)/loopctl/losetup
	-rmdir $(DESTDIR)$(libexecdir)/loopctl
	rm -f $(DESTDIR)$(mounthelperdir)/umount.loopd
	rm -f $(DESTDIR)$(applicationsdir)/org.loopd1.open.desktop $(DESTDIR)$(servicemenudir)/org.loopd1.servicemenu.desktop
	rm -rf $(DESTDIR)$(nautilusdir)
	-rmdir $(DESTDIR)$(dir $(nautilusdir))
	rm -f $(DESTDIR)$(dbuspolicydir)/org.loopd1.conf $(DESTDIR)$(polkitactiondir)/org.loopd1.policy
	rm -f $(DESTDIR)$(dbusservicedir)/org.loopd1.service
	rm -f $(DESTDIR)$(unitdir)/loopd.service $(DESTDIR)$(unitdir)/loop-image@.service
	rm -f $(patsubst dbus/%,$(DESTDIR)$(datadir)/dbus-1/interfaces/%,$(wildcard dbus/*.xml))
	rm -f $(DESTDIR)$(bashcompletiondir)/loopctl $(DESTDIR)$(zshcompletiondir)/_loopctl
	rm -f $(DESTDIR)$(fishcompletiondir)/loopctl.fish
	rm -f $(foreach page,$(notdir $(wildcard docs/*.[1-8] docs/man/*.[1-8])),$(DESTDIR)$(mandir)/man$(subst .,,$(suffix $(page)))/$(page))
	rm -rf $(DESTDIR)$(docdir)
