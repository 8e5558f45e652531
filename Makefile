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
# The bus and polkit look nowhere else, whatever PREFIX is.
dbuspolicydir ?= /usr/share/dbus-1/system.d
polkitactiondir ?= /usr/share/polkit-1/actions
# Nor does every udev.
udevrulesdir ?= /usr/lib/udev/rules.d
# Nor does umount: its /sbin is this one, wherever /usr is merged.
mounthelperdir ?= /usr/sbin

CARGO ?= cargo
INSTALL ?= install
TARGET := $(or $(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET)/release

# cargo runs as whoever calls make; what it builds for the host tests runs as root.
ifneq ($(shell id -u),0)
KEEP := LOOPD_BIN,LOOPD_LOG,LOOPD_LOSETUP,LOOPD_LOSETUP_RECORD,LOOPD_TEST_LIMIT,LOOPD_TEST_ROUNDS,LOOPD_TEST_SEED,RUST_BACKTRACE
AS_ROOT := --config 'target."cfg(unix)".runner = ["sudo", "--preserve-env=$(KEEP)"]'
endif

# Which Debian `make test-vm` boots.
SUITE ?= bookworm
# The package's own revision.
REVISION ?= 1

.PHONY: all help deps deps-packages deps-vm check docs test test-vm soak bench bench-hostile demo deb rpm check-packages install uninstall

all:
	$(CARGO) build --release -p loopd -p loopctl

help:
	@echo "make              build in release mode"
	@echo "make install      install below PREFIX ($(PREFIX)) in DESTDIR; make first"
	@echo "make uninstall    remove what make install has installed"
	@echo "make demo         show what it does, on a private bus"
	@echo "make test         unit tests, and the host tests as root; TESTS=word selects host tests"
	@echo "make test-vm      the system tests, in a virtual machine with SUITE ($(SUITE)); TESTS as above"
	@echo "make deb, rpm     the packages, in $(TARGET)/package; REVISION ($(REVISION)) is theirs"
	@echo "make check-packages  look into both packages"
	@echo "make soak         the long tests at full length, as root: about an hour; TESTS=part selects one"
	@echo "make bench        measure attaching, as root"
	@echo "make bench-hostile  measure what one user's worst costs another, as root"
	@echo "make check        formatting, lints, shipped files"
	@echo "make docs         make the manual pages and completions anew"
	@echo "make deps         install the Debian packages that all this needs"

deps:
	@tests/deps.sh

deps-packages:
	@tests/deps.sh packages

deps-vm:
	@tests/deps.sh packages vm

check: deps
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) build -p loopd
	$(CARGO) run -q -p loopd-tests --bin loopd-docs -- --check
	tests/check-files.sh

docs: deps
	$(CARGO) build -p loopd
	$(CARGO) run -q -p loopd-tests --bin loopd-docs

test: deps
	$(CARGO) build --workspace --bins
	$(CARGO) test --workspace --exclude loopd-tests
	$(CARGO) test -p loopd-tests --lib --bins
	$(CARGO) test -p loopd-tests --test host $(AS_ROOT) -- $(TESTS)

test-vm: deps-vm all
	$(CARGO) build -p loopd-tests --bin loopd-probe
	tests/vm/run.sh $(SUITE) $(TARGET)/debug $(TESTS)

soak: deps
	$(CARGO) build --workspace --bins
	tests/soak.sh $(TESTS)

deb: deps-packages all
	packaging/deb.sh $(REVISION)

rpm: deps-packages all
	packaging/rpm.sh $(REVISION)

check-packages: deps-packages all
	packaging/check.sh

bench: deps all
	$(CARGO) build --release -p loopd-tests --bins
	$(CARGO) bench -p loopd-tests --bench attach $(AS_ROOT)

bench-hostile: deps all
	$(CARGO) build --release -p loopd-tests --bins
	$(CARGO) bench -p loopd-tests --bench hostile $(AS_ROOT)

demo: deps
	$(CARGO) build -p loopd -p loopctl
	tests/demo.sh $(TARGET)/debug

# Does not build: root need not have cargo.
install:
	@test -x $(RELEASE)/loopd && test -x $(RELEASE)/loopctl || { echo "not built yet: run make first" >&2; exit 1; }
	$(INSTALL) -D -m 755 $(RELEASE)/loopd $(DESTDIR)$(libexecdir)/loopd
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
	rm -f $(DESTDIR)$(libexecdir)/untrusted-loop
	rm -f $(DESTDIR)$(libexecdir)/loopd $(DESTDIR)$(libexecdir)/loop-image $(DESTDIR)$(bindir)/loopctl
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
