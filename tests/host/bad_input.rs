//! Invalid input fails with a named error and a message, and leaves nothing behind: after each test the runner
//! checks for devices, descriptors and processes.

use std::ffi::{OsStr, OsString};
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use loopd_dbus::names::{BUS_NAME, MANAGER, ROOT_PATH};
use loopd_dbus::properties::from_bus_path;
use loopd_dbus::{AttachOptions, ErrorKind, Lifetime};
use loopd_tests::fixture::{Fixture, expect_kind, refusal};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::eventually;
use loopd_tests::udev::Listener;
use loopd_tests::{GAMES, Outcome, ROOT, User};

loopd_tests::tests! {
    "bad_input";
    Setup::None => [
        directory, pipe, socket, dev_null, path_only, write_only, empty_file,
        offset_at_the_end, offset_past_the_end, offset_unaligned_with_direct_io, offset_huge,
        size_limit_huge,
        block_size_1000, block_size_256, block_size_131072, block_size_1, block_size_u32_max,
        unknown_option, empty_option, option_in_capitals,
        offset_as_u32, offset_as_i64, offset_as_string, read_only_as_u32, block_size_as_u64,
        lifetime_as_bool, reference_as_bytes, number_as_u64, wait_as_string,
        lifetime_word, lifetime_empty, overlap_word,
        reference_too_long, reference_too_long_in_bytes,
        unknown_detach_option, detach_lazy_as_string, unknown_list_option, list_all_as_u32,
        list_file_as_string, list_offset_as_u32,
        uevents_flow_after_bad_block_sizes,
        number_in_use_is_busy,
        missing_arguments_are_refused,
        unknown_members_are_refused,
        trailing_space, newline, not_utf8, quotes_and_backslashes, long_name,
        unlinked_file_is_attached, memfd_is_attached,
        append_only_descriptor_is_refused, sealed_memfd_is_read_only, kernel_generated_files_are_refused,
    ];
    Setup::StandIn(Answer::No) => [block_device_needs_authorization];
    Setup::StandIn(Answer::Yes) => [bad_input_of_an_authorized_user_is_refused];
}

/// The probe's arguments for `SetupLoop` on a new image, or on a file of this kind.
fn setup_arguments(fixture: &Fixture, kind: &str, options: &[&str]) -> anyhow::Result<Vec<OsString>> {
    let path = match kind {
        "dir" => fixture.directory.clone(),
        "empty" => Image::sparse(&fixture.directory, "empty", 0)?.path,
        _ => Image::sparse(&fixture.directory, "image", MIB)?.path,
    };
    let kind = if kind == "empty" { "regular" } else { kind };
    let arguments = [OsStr::new("setup"), OsStr::new(kind), path.as_os_str()];
    Ok(arguments.into_iter().chain(options.iter().map(OsStr::new)).map(OsStr::to_owned).collect())
}

async fn refused(fixture: &Fixture, user: User, kind: &str, options: &[&str], error: ErrorKind) -> Outcome {
    let arguments = setup_arguments(fixture, kind, options)?;
    fixture.probe(user, arguments).await?.refused(error)?;
    assert!(fixture.list(false).await?.is_empty());
    Ok(())
}

/// Tests that attach a file of this kind with these options and get this error.
macro_rules! refused {
    ($($name:ident: $kind:literal $(, $option:literal)* => $error:ident;)*) => {$(
        async fn $name(fixture: &mut Fixture) -> Outcome {
            refused(fixture, ROOT, $kind, &[$($option),*], ErrorKind::$error).await
        }
    )*};
}

refused! {
    directory: "dir" => InvalidBackingFile;
    pipe: "pipe" => InvalidBackingFile;
    socket: "socket" => InvalidBackingFile;
    dev_null: "null" => InvalidBackingFile;
    path_only: "opath" => InvalidBackingFile;
    write_only: "wronly" => InvalidBackingFile;
    empty_file: "empty" => InvalidBackingFile;

    offset_at_the_end: "regular", "offset=t:1048576" => InvalidArgs;
    offset_past_the_end: "regular", "offset=t:1049088" => InvalidArgs;
    offset_unaligned_with_direct_io: "regular", "offset=t:100", "direct-io=b:true" => InvalidArgs;
    offset_huge: "regular", "offset=t:9223372036854775808" => InvalidArgs;
    size_limit_huge: "regular", "size-limit=t:9223372036854775808" => InvalidArgs;

    block_size_1000: "regular", "block-size=u:1000" => InvalidArgs;
    block_size_256: "regular", "block-size=u:256" => InvalidArgs;
    block_size_131072: "regular", "block-size=u:131072" => InvalidArgs;
    block_size_1: "regular", "block-size=u:1" => InvalidArgs;
    block_size_u32_max: "regular", "block-size=u:4294967295" => InvalidArgs;

    unknown_option: "regular", "ofset=t:512" => InvalidArgs;
    empty_option: "regular", "=b:true" => InvalidArgs;
    option_in_capitals: "regular", "Offset=t:512" => InvalidArgs;
    offset_as_u32: "regular", "offset=u:512" => InvalidArgs;
    offset_as_i64: "regular", "offset=x:512" => InvalidArgs;
    offset_as_string: "regular", "offset=s:512" => InvalidArgs;
    read_only_as_u32: "regular", "read-only=u:1" => InvalidArgs;
    block_size_as_u64: "regular", "block-size=t:512" => InvalidArgs;
    lifetime_as_bool: "regular", "lifetime=b:true" => InvalidArgs;
    reference_as_bytes: "regular", "reference=as:x" => InvalidArgs;
    number_as_u64: "regular", "number=t:1" => InvalidArgs;
    wait_as_string: "regular", "wait=s:true" => InvalidArgs;
    lifetime_word: "regular", "lifetime=s:forever" => InvalidArgs;
    lifetime_empty: "regular", "lifetime=s:" => InvalidArgs;
    overlap_word: "regular", "overlap=s:perhaps" => InvalidArgs;
    reference_too_long: "regular",
        "reference=s:0123456789012345678901234567890123456789012345678901234567890123" => InvalidArgs;
    reference_too_long_in_bytes: "regular",
        "reference=s:éééééééééééééééééééééééééééééééé" => InvalidArgs;
}

/// Tests of the options of other methods, on a device that must not change.
macro_rules! refused_option {
    ($($name:ident: $($word:literal),* => $error:ident;)*) => {$(
        async fn $name(fixture: &mut Fixture) -> Outcome {
            let image = Image::sparse(&fixture.directory, "image", MIB)?;
            let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
            let attached = fixture.attach(&image.open()?, &options).await?;
            let node = attached.device.node();
            let arguments = [$($word),*].map(|word| word.replace("DEVICE", &node));
            fixture.probe(ROOT, arguments).await?.refused(ErrorKind::$error)?;
            assert!(attached.device.bound());
            fixture.detach(&attached).await
        }
    )*};
}

refused_option! {
    unknown_detach_option: "detach", "DEVICE", "force=b:true" => InvalidArgs;
    detach_lazy_as_string: "detach", "DEVICE", "lazy=s:true" => InvalidArgs;
    unknown_list_option: "list", "everything=b:true" => InvalidArgs;
    list_all_as_u32: "list", "all=u:1" => InvalidArgs;
    list_file_as_string: "list", "file=s:/etc/passwd" => InvalidArgs;
    list_offset_as_u32: "list", "offset=u:0" => InvalidArgs;
}

/// The kernel suppresses uevents after a LOOP_CONFIGURE with an invalid block size.
async fn uevents_flow_after_bad_block_sizes(fixture: &mut Fixture) -> Outcome {
    let image =
        Image::ext4(&fixture.directory, "image", "flows", "11111111-2222-3333-4444-00000000000e").await?;
    let device = loopd_tests::sysfs::last_free()?;
    let at = AttachOptions { number: Some(device.0), ..AttachOptions::default() };
    for block_size in [1000, 256, 131_072] {
        let error = fixture.attach_fails(&image.open()?, &AttachOptions { block_size, ..at.clone() }).await?;
        expect_kind(&error, ErrorKind::InvalidArgs)?;
    }
    assert!(!device.flag("ro")?);
    let listener = Listener::start(&fixture.directory).await?;
    let attached = fixture.attach(&image.open()?, &at).await?;
    eventually("udev has processed the device", async || {
        let events = listener.about(device)?;
        Ok(["KERNEL", "UDEV"].iter().all(|source| events.iter().any(|event| event.source == *source)))
    })
    .await?;
    assert_eq!(fixture.volume(&attached.path).await?.filesystem_label, "flows");
    fixture.detach(&attached).await?;
    listener.stop().await
}

async fn number_in_use_is_busy(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let first = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let same = AttachOptions { number: Some(first.device.0), ..AttachOptions::default() };
    let error = fixture.attach_fails(&image.open()?, &same).await?;
    expect_kind(&error, ErrorKind::Busy)?;
    assert!(error.message.contains(&first.device.node()), "{error}");
    assert!(first.device.bound());
    fixture.detach(&first).await
}

async fn missing_arguments_are_refused(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let file = image.open()?;
    let method = |name: &'static str| {
        zbus::Message::method_call(ROOT_PATH, name).destination(BUS_NAME).interface(MANAGER)
    };
    let calls = [
        method("SetupLoop").build(&())?,
        method("SetupLoop").build(&(zbus::Fd::from(file.as_fd()),))?,
        method("SetupLoop").build(&("/etc/passwd",))?,
        method("Detach").build(&())?,
        method("Detach").build(&(0u32,))?,
        method("List").build(&())?,
    ];
    let mut messages = zbus::MessageStream::from(&fixture.connection);
    for call in &calls {
        fixture.connection.send(call).await?;
        let serial = Some(call.primary_header().serial_num());
        let reply = loop {
            let message = messages.next().await.context("the bus is gone")??;
            if message.header().reply_serial() == serial {
                break message;
            }
        };
        assert_eq!(
            reply.header().error_name().map(|name| name.as_str()),
            Some(ErrorKind::InvalidArgs.name())
        );
    }
    assert!(fixture.list(false).await?.is_empty());
    Ok(())
}

async fn unknown_members_are_refused(fixture: &mut Fixture) -> Outcome {
    for (path, method) in [(ROOT_PATH, "Format"), ("/org/loopd1/attachment/0", "Detach"), ("/", "List")] {
        let reply = fixture.connection.call_method(Some(BUS_NAME), path, Some(MANAGER), method, &()).await;
        assert!(reply.is_err(), "{path} {method}");
    }
    Ok(())
}

/// Attaches a file of this name as root; its path comes back byte for byte.
async fn name_comes_back(fixture: &Fixture, name: &[u8]) -> Outcome {
    let image = Image::sparse(&fixture.directory, OsStr::from_bytes(name), MIB)?;
    let mut probe = fixture.probe_hold(
        ROOT,
        [OsStr::new("--hold"), OsStr::new("setup"), OsStr::new("regular"), image.path.as_os_str()],
    )?;
    let attached = probe.reply().await?.attached()?;
    let shown = fixture.properties(&attached.path).await?.backing_file;
    assert_eq!(from_bus_path(&shown), image.path.as_os_str().as_bytes());
    probe.close().await?;
    fixture.gone(&attached).await
}

/// Tests that attach a file of this name.
macro_rules! names {
    ($($name:ident: $bytes:expr;)*) => {$(
        async fn $name(fixture: &mut Fixture) -> Outcome {
            name_comes_back(fixture, $bytes).await
        }
    )*};
}

names! {
    trailing_space: b"image  ";
    newline: b"two\nlines\n";
    not_utf8: b"image-\xff\xfe";
    quotes_and_backslashes: br#"a "b" 'c' \d $e `f` (deleted)"#;
    long_name: &[b'n'; 200];
}

/// Data written to the device of such a file can be read back.
async fn nameless(fixture: &Fixture, kind: &str) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let path = image.name();
    let mut probe = fixture.probe_hold(ROOT, ["--hold", "setup", kind, path])?;
    let attached = probe.reply().await?.attached()?;
    assert_eq!(attached.device.number::<u64>("size")?, MIB / 512);
    fixture.properties(&attached.path).await?;
    let mut device = std::fs::File::options().write(true).open(attached.device.node())?;
    device.write_all(&[7; 4096])?;
    device.sync_all()?;
    drop(device);
    let mut bytes = [0; 4096];
    std::fs::File::open(attached.device.node())?.read_exact(&mut bytes)?;
    assert_eq!(bytes, [7; 4096]);
    probe.close().await?;
    fixture.gone(&attached).await
}

async fn unlinked_file_is_attached(fixture: &mut Fixture) -> Outcome {
    nameless(fixture, "unlinked").await
}

async fn memfd_is_attached(fixture: &mut Fixture) -> Outcome {
    nameless(fixture, "memfd").await
}

async fn block_device_needs_authorization(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let lower = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let node = std::fs::File::options().read(true).write(true).open(lower.device.node())?;
    let mut command = fixture.tool(GAMES, "loopd-probe")?;
    command.args(["setup", "stdin", "-"]).stdin(node);
    let mut probe = loopd_tests::probe::Probe::spawn_with_input(command)?;
    probe.reply().await?.refused(ErrorKind::AccessDenied)?;
    probe.close().await?;
    fixture.detach(&lower).await
}

/// The same refusals for an authorized user: authorization does not bypass the checks.
async fn bad_input_of_an_authorized_user_is_refused(fixture: &mut Fixture) -> Outcome {
    for (kind, options, error) in [
        ("dir", &[][..], ErrorKind::InvalidBackingFile),
        ("pipe", &[], ErrorKind::InvalidBackingFile),
        ("opath", &[], ErrorKind::InvalidBackingFile),
        ("regular", &["offset=t:9999999"], ErrorKind::InvalidArgs),
        ("regular", &["block-size=u:1000"], ErrorKind::InvalidArgs),
    ] {
        refused(fixture, GAMES, kind, options, error).await?;
        let _ = std::fs::remove_file(fixture.directory.join("image"));
    }
    Ok(())
}

/// Linux would overwrite an append-only file, or append every block.
async fn append_only_descriptor_is_refused(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let appending = std::fs::File::options().read(true).append(true).open(&image.path)?;
    let error = fixture.attach_fails(&appending, &AttachOptions::default()).await?;
    expect_kind(&error, ErrorKind::InvalidBackingFile)?;
    assert!(error.message.contains("O_APPEND") && error.message.contains("for reading only"), "{error}");
    // A read-only device never writes.
    let read_only = AttachOptions { read_only: true, ..AttachOptions::default() };
    let attached = fixture.attach(&appending, &read_only).await?;
    let object = fixture.object(&attached.path).await?;
    let error = refusal(object.replace_backing_file(appending.as_fd()).await)?;
    expect_kind(&error, ErrorKind::InvalidBackingFile)?;
    assert!(error.message.contains("O_APPEND"), "{error}");
    fixture.detach(&attached).await?;
    let only_reading = image.open_read_only()?;
    let attached = fixture.attach(&only_reading, &AttachOptions::default()).await?;
    fixture.detach(&attached).await
}

/// A sealed file gives a read-only device, independent of the open mode.
async fn sealed_memfd_is_read_only(fixture: &mut Fixture) -> Outcome {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    for (seal, read_only) in [
        (SealFlag::F_SEAL_SHRINK, false),
        (SealFlag::F_SEAL_WRITE, true),
        (SealFlag::F_SEAL_FUTURE_WRITE, true),
    ] {
        let file = std::fs::File::from(memfd_create("sealed", MFdFlags::MFD_ALLOW_SEALING)?);
        file.set_len(MIB)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seal))?;
        let attached = fixture.attach(&file, &AttachOptions::default()).await?;
        assert_eq!(fixture.properties(&attached.path).await?.read_only, read_only, "{seal:?}");
        fixture.detach(&attached).await?;
    }
    Ok(())
}

/// The kernel would read it with its own rights, not with those of the user who opened it.
async fn kernel_generated_files_are_refused(fixture: &mut Fixture) -> Outcome {
    for path in [
        "/proc/kallsyms",
        "/proc/self/status",
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/sys/power/state",
    ] {
        let Ok(file) = std::fs::File::open(path) else { continue };
        let error = fixture.attach_fails(&file, &AttachOptions::default()).await?;
        expect_kind(&error, ErrorKind::InvalidBackingFile)?;
        assert!(error.message.contains("copy it first"), "{error}");
    }
    Ok(())
}
