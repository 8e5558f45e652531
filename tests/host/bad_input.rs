//! Nothing that a caller sends does more than fail with a named error and a message, and nothing is
//! left behind: the runner looks after each test for devices, descriptors and processes.

use std::ffi::{OsStr, OsString};
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use loopd_dbus::names::{BUS_NAME, MANAGER, ROOT_PATH};
use loopd_dbus::properties::from_bus_path;
use loopd_dbus::{AttachOptions, ErrorKind, Lifetime};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::eventually;
use loopd_tests::udev::Listener;
use loopd_tests::world::{World, expect_kind, refusal};
use loopd_tests::{GAMES, Outcome, ROOT, User};

loopd_tests::tests! {
    "bad_input";
    Setup::None => [
        directory, pipe, socket, dev_null, path_only, write_only, empty_file,
        offset_at_the_end, offset_past_the_end, offset_unaligned, offset_huge,
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
        number_taken,
        arguments_missing,
        unknown_members,
        trailing_space, newline, not_utf8, quotes_and_backslashes, long_name,
        unlinked, memfd,
        append_only, sealed, made_when_it_is_read,
    ];
    Setup::StandIn(Answer::No) => [block_device_without_right];
    Setup::StandIn(Answer::Yes) => [as_a_user];
}

/// The probe's words for `SetupLoop` on a fresh image, or on what the kind stands for.
fn setup_words(world: &World, kind: &str, options: &[&str]) -> anyhow::Result<Vec<OsString>> {
    let path = match kind {
        "dir" => world.folder.clone(),
        "empty" => Image::sparse(&world.folder, "empty", 0)?.path,
        _ => Image::sparse(&world.folder, "image", MIB)?.path,
    };
    let kind = if kind == "empty" { "regular" } else { kind };
    let words = [OsStr::new("setup"), OsStr::new(kind), path.as_os_str()];
    Ok(words.into_iter().chain(options.iter().map(OsStr::new)).map(OsStr::to_owned).collect())
}

async fn refused(world: &World, user: User, kind: &str, options: &[&str], error: ErrorKind) -> Outcome {
    let words = setup_words(world, kind, options)?;
    world.probe(user, words).await?.refused(error)?;
    assert!(world.list(false).await?.is_empty());
    Ok(())
}

/// Tests that attach a file of this kind with these options and get this error.
macro_rules! refused {
    ($($name:ident: $kind:literal $(, $option:literal)* => $error:ident;)*) => {$(
        async fn $name(world: &mut World) -> Outcome {
            refused(world, ROOT, $kind, &[$($option),*], ErrorKind::$error).await
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
    offset_unaligned: "regular", "offset=t:100" => InvalidArgs;
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

/// Tests of the other methods' options, on a device that must stay as it is.
macro_rules! refused_option {
    ($($name:ident: $($word:literal),* => $error:ident;)*) => {$(
        async fn $name(world: &mut World) -> Outcome {
            let image = Image::sparse(&world.folder, "image", MIB)?;
            let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
            let attached = world.attach(&image.open()?, &options).await?;
            let node = attached.device.node();
            let words = [$($word),*].map(|word| word.replace("DEVICE", &node));
            world.probe(ROOT, words).await?.refused(ErrorKind::$error)?;
            assert!(attached.device.bound());
            world.detach(&attached).await
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

/// The kernel keeps uevents back after a LOOP_CONFIGURE with a bad block size.
async fn uevents_flow_after_bad_block_sizes(world: &mut World) -> Outcome {
    let image = Image::ext4(&world.folder, "image", "flows", "11111111-2222-3333-4444-00000000000e").await?;
    let device = loopd_tests::sysfs::last_free()?;
    let at = AttachOptions { number: Some(device.0), ..AttachOptions::default() };
    for block_size in [1000, 256, 131_072] {
        let error = world.attach_fails(&image.open()?, &AttachOptions { block_size, ..at.clone() }).await?;
        expect_kind(&error, ErrorKind::InvalidArgs)?;
    }
    assert!(!device.flag("ro")?);
    let listener = Listener::start(&world.folder).await?;
    let attached = world.attach(&image.open()?, &at).await?;
    eventually("udev tells of the device", async || {
        let events = listener.about(device)?;
        Ok(["KERNEL", "UDEV"].iter().all(|source| events.iter().any(|event| event.source == *source)))
    })
    .await?;
    assert_eq!(world.volume(&attached.path).await?.filesystem_label, "flows");
    world.detach(&attached).await?;
    listener.stop().await
}

async fn number_taken(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let first = world.attach(&image.open()?, &AttachOptions::default()).await?;
    let same = AttachOptions { number: Some(first.device.0), ..AttachOptions::default() };
    let error = world.attach_fails(&image.open()?, &same).await?;
    expect_kind(&error, ErrorKind::Busy)?;
    assert!(error.message.contains(&first.device.node()), "{error}");
    assert!(first.device.bound());
    world.detach(&first).await
}

async fn arguments_missing(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
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
    let mut messages = zbus::MessageStream::from(&world.connection);
    for call in &calls {
        world.connection.send(call).await?;
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
    assert!(world.list(false).await?.is_empty());
    Ok(())
}

async fn unknown_members(world: &mut World) -> Outcome {
    for (path, method) in [(ROOT_PATH, "Format"), ("/org/loopd1/attachment/0", "Detach"), ("/", "List")] {
        let reply = world.connection.call_method(Some(BUS_NAME), path, Some(MANAGER), method, &()).await;
        assert!(reply.is_err(), "{path} {method}");
    }
    Ok(())
}

/// Attaches a file of this name as root; its path comes back byte for byte.
async fn name_comes_back(world: &World, name: &[u8]) -> Outcome {
    let image = Image::sparse(&world.folder, OsStr::from_bytes(name), MIB)?;
    let mut probe = world.probe_hold(
        ROOT,
        [OsStr::new("--hold"), OsStr::new("setup"), OsStr::new("regular"), image.path.as_os_str()],
    )?;
    let attached = probe.reply().await?.attached()?;
    let shown = world.properties(&attached.path).await?.backing_file;
    assert_eq!(from_bus_path(&shown), image.path.as_os_str().as_bytes());
    probe.close().await?;
    world.gone(&attached).await
}

/// Tests that attach a file of this name.
macro_rules! names {
    ($($name:ident: $bytes:expr;)*) => {$(
        async fn $name(world: &mut World) -> Outcome {
            name_comes_back(world, $bytes).await
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

/// What is written through the device of such a file can be read back.
async fn nameless(world: &World, kind: &str) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let path = image.path.to_str().unwrap();
    let mut probe = world.probe_hold(ROOT, ["--hold", "setup", kind, path])?;
    let attached = probe.reply().await?.attached()?;
    assert_eq!(attached.device.number::<u64>("size")?, MIB / 512);
    world.properties(&attached.path).await?;
    let mut device = std::fs::File::options().write(true).open(attached.device.node())?;
    device.write_all(&[7; 4096])?;
    device.sync_all()?;
    drop(device);
    let mut bytes = [0; 4096];
    std::fs::File::open(attached.device.node())?.read_exact(&mut bytes)?;
    assert_eq!(bytes, [7; 4096]);
    probe.close().await?;
    world.gone(&attached).await
}

async fn unlinked(world: &mut World) -> Outcome {
    nameless(world, "unlinked").await
}

async fn memfd(world: &mut World) -> Outcome {
    nameless(world, "memfd").await
}

async fn block_device_without_right(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let lower = world.attach(&image.open()?, &AttachOptions::default()).await?;
    let node = std::fs::File::options().read(true).write(true).open(lower.device.node())?;
    let mut command = world.tool(GAMES, "loopd-probe")?;
    command.args(["setup", "stdin", "-"]).stdin(node);
    let mut probe = loopd_tests::probe::Probe::spawn_with_input(command)?;
    probe.reply().await?.refused(ErrorKind::AccessDenied)?;
    probe.close().await?;
    world.detach(&lower).await
}

/// The same refusals for someone whom polkit lets: a permission is no way round the checks.
async fn as_a_user(world: &mut World) -> Outcome {
    for (kind, options, error) in [
        ("dir", &[][..], ErrorKind::InvalidBackingFile),
        ("pipe", &[], ErrorKind::InvalidBackingFile),
        ("opath", &[], ErrorKind::InvalidBackingFile),
        ("regular", &["offset=t:100"], ErrorKind::InvalidArgs),
        ("regular", &["block-size=u:1000"], ErrorKind::InvalidArgs),
    ] {
        refused(world, GAMES, kind, options, error).await?;
        let _ = std::fs::remove_file(world.folder.join("image"));
    }
    Ok(())
}

/// Linux would overwrite what only may be appended to, or append every block.
async fn append_only(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let appending = std::fs::File::options().read(true).append(true).open(&image.path)?;
    let error = world.attach_fails(&appending, &AttachOptions::default()).await?;
    expect_kind(&error, ErrorKind::InvalidBackingFile)?;
    assert!(error.message.contains("O_APPEND") && error.message.contains("for reading only"), "{error}");
    // A read-only device never writes.
    let read_only = AttachOptions { read_only: true, ..AttachOptions::default() };
    let attached = world.attach(&appending, &read_only).await?;
    let object = world.object(&attached.path).await?;
    let error = refusal(object.replace_backing_file(appending.as_fd()).await)?;
    expect_kind(&error, ErrorKind::InvalidBackingFile)?;
    assert!(error.message.contains("O_APPEND"), "{error}");
    world.detach(&attached).await?;
    let only_reading = image.open_read_only()?;
    let attached = world.attach(&only_reading, &AttachOptions::default()).await?;
    world.detach(&attached).await
}

/// What may not be written to is a read-only device, however it was opened.
async fn sealed(world: &mut World) -> Outcome {
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
        let attached = world.attach(&file, &AttachOptions::default()).await?;
        assert_eq!(world.properties(&attached.path).await?.read_only, read_only, "{seal:?}");
        world.detach(&attached).await?;
    }
    Ok(())
}

/// The kernel would read it by its own rights, and not by those of whoever opened it.
async fn made_when_it_is_read(world: &mut World) -> Outcome {
    for path in [
        "/proc/kallsyms",
        "/proc/self/status",
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/sys/power/state",
    ] {
        let Ok(file) = std::fs::File::open(path) else { continue };
        let error = world.attach_fails(&file, &AttachOptions::default()).await?;
        expect_kind(&error, ErrorKind::InvalidBackingFile)?;
        assert!(error.message.contains("copy it first"), "{error}");
    }
    Ok(())
}
