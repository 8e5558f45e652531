//! A raw client for the tests: makes one call with the given arguments, valid or not. Prints `ok` or the
//! error's name, and on the next lines the result or the error's message.
//!
//! ```text
//! loopd-probe [--json] [--hold] [--interactive] [--prompted] CALL
//!   setup KIND PATH [key=sig:value…]   KIND: regular rdonly wronly opath direct dir pipe socket
//!                                      null memfd unlinked block stdin
//!   detach DEVICE [key=sig:value…]
//!   list [key=sig:value…]
//!   get PATH INTERFACE
//!   detach-object PATH [key=sig:value…]
//!   change PATH METHOD [sig:value]     a method of the attachment; h:PATH is a file
//!   remove DEVICE
//!   mount PATH [key=sig:value…]        PATH: the object of an attachment or a partition
//!   unmount PATH [key=sig:value…]
//!   unlock PATH KIND SECRET [key=sig:value…]   SECRET: a file, opened as for setup
//!   lock PATH [key=sig:value…]
//!   storm ROUNDS CALLS FROM TO         CALLS within 20 ms, at a random moment FROM to TO ms after
//!                                      the last; prints how many got no reply
//!   burst CALLS PATH                   attaches the file CALLS times at once, with an offset past its end; prints how
//!                                      many got no InvalidArgs
//!   clock ROUNDS PATH                  attaches and detaches the file; the microseconds of each
//!   flood KIND [PATH]                  keeps a hundred calls pending until killed: ping, list, properties,
//!                                      objects, introspect, setup (of PATH, failures and all), hang (SetupLoop
//!                                      of standard input), bus (GetId, which only the bus answers)
//!   attack PID MESSAGES SEED           malformed messages of `nobody` to loopd, the process PID, next to a client of
//!                                      root that must be served; prints the effect, and how the bus filters
//! ```
//!
//! `--json` prints one line: `{"ok": …}` or `{"error": name, "message": …}`. `--hold` keeps the
//! connection until standard input closes. `--interactive` allows polkit to prompt. `--prompted` prints `ready` when
//! connected, and makes the call when it reads a line.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufRead as _, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use loopd_dbus::names::{ATTACHMENT, BUS_NAME, MANAGER, ROOT_PATH, VOLUME};
use loopd_tests::NOBODY;
use loopd_tests::hostile::{Attack, BusConduct, Trial};
use loopd_tests::process::pid;
use nix::fcntl::OFlag;
use serde_json::{Value, json};
use zbus::proxy::MethodFlags;
use zbus::wire::{DynamicType, OwnedObjectPath};
use zbus::{Connection, Fd, OwnedVariant, Variant};

const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const ENCRYPTED: &str = "org.loopd1.Encrypted";

fn main() -> Result<()> {
    let (flags, call): (Vec<_>, Vec<_>) =
        std::env::args_os().skip(1).partition(|argument| argument.as_bytes().starts_with(b"--"));
    let has = |flag: &str| flags.iter().any(|argument| argument == flag);
    let interaction =
        if has("--interactive") { MethodFlags::ALLOW_INTERACTIVE_AUTH } else { MethodFlags::empty() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    if call.first().is_some_and(|argument| argument == "attack") {
        return attack(&call[1..]);
    }
    let connection = runtime.block_on(Connection::system())?;
    if has("--prompted") {
        say("ready")?;
        std::io::stdin().lock().read_line(&mut String::new())?;
    }
    let answer = match runtime.block_on(make(&call, &connection, interaction)) {
        Ok(result) => json!({ "ok": result }),
        Err(error) => error_of(error)?,
    };
    say(&if has("--json") { answer.to_string() } else { plain(&answer) })?;
    if has("--hold") {
        std::io::stdin().lock().read_to_end(&mut Vec::new())?;
    }
    Ok(())
}

/// Attacks loopd on the bus of `DBUS_SYSTEM_BUS_ADDRESS`.
fn attack(arguments: &[OsString]) -> Result<()> {
    let number = |index: usize| -> Result<u64> {
        let argument = arguments
            .get(index)
            .and_then(|argument| argument.to_str())
            .context("attack PID MESSAGES SEED")?;
        Ok(argument.parse()?)
    };
    let address = std::env::var("DBUS_SYSTEM_BUS_ADDRESS")?;
    let attack = Attack {
        address: address.clone(),
        user: NOBODY,
        target: BUS_NAME.to_owned(),
        answers: true,
        seed: number(2)?,
        messages: usize::try_from(number(1)?)?,
        // dbus-broker disconnects a client that sends a malformed header.
        batch: 1,
        time: Duration::MAX,
    };
    let conduct = std::thread::spawn(move || BusConduct::learn(&address, NOBODY, BUS_NAME));
    say(&format!("{:?}", conduct.join().expect("no panic")?))?;
    say(&Trial::run(&attack, pid(u32::try_from(number(0)?)?))?.to_string())
}

fn say(line: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{line}")?;
    Ok(output.flush()?)
}

/// The reply for shell scripts, which read the first line separately.
fn plain(answer: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match answer.get("ok") {
        Some(result) => format!("ok\n{}", text(result)),
        None => format!("{}\n{}", text(&answer["error"]), text(&answer["message"])),
    }
}

/// An error of the other side as a value; our own failures remain errors.
fn error_of(error: anyhow::Error) -> Result<Value> {
    match error.downcast::<zbus::Error>()? {
        zbus::Error::MethodError(name, message, _) => {
            Ok(json!({ "error": name.as_str(), "message": message }))
        }
        zbus::Error::FDO(error) => {
            let name = zbus::DBusError::name(&*error).to_string();
            Ok(json!({ "error": name, "message": zbus::DBusError::description(&*error) }))
        }
        error => Err(error.into()),
    }
}

async fn make(arguments: &[OsString], connection: &Connection, flags: MethodFlags) -> Result<Value> {
    let text = |index: usize| {
        let argument = arguments.get(index).with_context(|| format!("argument {index} is missing"))?;
        argument.to_str().with_context(|| format!("{argument:?} is not UTF-8"))
    };
    match text(0)? {
        "setup" => {
            let path = arguments.get(2).context("which file?")?;
            let file = open(text(1)?, Path::new(path))?;
            let body = (Fd::from(file.as_fd()), options(&arguments[3..])?);
            let (attachment, device): (OwnedObjectPath, String) =
                call(connection, ROOT_PATH, MANAGER, "SetupLoop", flags, &body).await?;
            Ok(json!({ "attachment": attachment.as_str(), "device": device }))
        }
        "detach" => {
            let body = (text(1)?, options(&arguments[2..])?);
            let () = call(connection, ROOT_PATH, MANAGER, "Detach", flags, &body).await?;
            Ok(Value::Null)
        }
        "detach-object" => {
            let body = (options(&arguments[2..])?,);
            let () = call(connection, text(1)?, ATTACHMENT, "Detach", flags, &body).await?;
            Ok(Value::Null)
        }
        "list" => {
            let body = (options(&arguments[1..])?,);
            let listed: Vec<(OwnedObjectPath, HashMap<String, OwnedVariant>)> =
                call(connection, ROOT_PATH, MANAGER, "List", flags, &body).await?;
            Ok(listed.iter().map(|(path, properties)| json!([path.as_str(), shown(properties)])).collect())
        }
        "change" => {
            change(connection, text(1)?, text(2)?, arguments.get(3).map(OsString::as_os_str), flags).await?;
            Ok(Value::Null)
        }
        "mount" => {
            let body = (options(&arguments[2..])?,);
            let place: String = call(connection, text(1)?, VOLUME, "Mount", flags, &body).await?;
            Ok(place.into())
        }
        "unmount" => {
            let body = (options(&arguments[2..])?,);
            let () = call(connection, text(1)?, VOLUME, "Unmount", flags, &body).await?;
            Ok(Value::Null)
        }
        "unlock" => {
            let secret = open(text(2)?, Path::new(text(3)?))?;
            let body = (Fd::from(secret.as_fd()), options(&arguments[4..])?);
            let (cleartext, device): (OwnedObjectPath, String) =
                call(connection, text(1)?, ENCRYPTED, "Unlock", flags, &body).await?;
            Ok(json!({ "cleartext": cleartext.as_str(), "device": device }))
        }
        "lock" => {
            let body = (options(&arguments[2..])?,);
            let () = call(connection, text(1)?, ENCRYPTED, "Lock", flags, &body).await?;
            Ok(Value::Null)
        }
        "remove" => {
            let () = call(connection, ROOT_PATH, MANAGER, "RemoveDevice", flags, &(text(1)?,)).await?;
            Ok(Value::Null)
        }
        "storm" => {
            let number = |index| Ok::<_, anyhow::Error>(text(index)?.parse::<u64>()?);
            Ok(storm(connection, number(1)?, number(2)?, number(3)?..number(4)?).await.into())
        }
        "burst" => Ok(burst(connection, text(1)?.parse()?, Path::new(text(2)?)).await?.into()),
        "clock" => clock(connection, text(1)?.parse()?, Path::new(text(2)?)).await,
        "flood" => flood(connection, text(1)?, arguments.get(2).map(Path::new), flags).await,
        "get" => {
            let body = (text(2)?,);
            let properties: HashMap<String, OwnedVariant> =
                call(connection, text(1)?, PROPERTIES, "GetAll", flags, &body).await?;
            Ok(shown(&properties))
        }
        other => bail!("no such call: {other}"),
    }
}

/// The duration of each attach and each detach, in microseconds.
async fn clock(connection: &Connection, rounds: usize, path: &Path) -> Result<Value> {
    let none = MethodFlags::empty();
    let mut times = Vec::new();
    for _ in 0..rounds {
        let file = open("regular", path)?;
        let body = (Fd::from(file.as_fd()), HashMap::<String, Variant<'static>>::new());
        let start = Instant::now();
        let (attachment, _): (OwnedObjectPath, String) =
            call(connection, ROOT_PATH, MANAGER, "SetupLoop", none, &body).await?;
        let attached = start.elapsed();
        let body = (HashMap::<String, Variant<'static>>::new(),);
        let start = Instant::now();
        let () = call(connection, attachment.as_str(), ATTACHMENT, "Detach", none, &body).await?;
        times.push(
            [attached, start.elapsed()].map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
        );
    }
    Ok(json!(times))
}

/// Calls continuously, ignoring the replies.
async fn flood(
    connection: &Connection,
    kind: &str,
    path: Option<&Path>,
    flags: MethodFlags,
) -> Result<Value> {
    const CALLS: usize = 100;
    let (interface, method) = match kind {
        "ping" => ("org.freedesktop.DBus.Peer", "Ping"),
        "list" | "list-all" => (MANAGER, "List"),
        "properties" => (PROPERTIES, "GetAll"),
        "objects" => ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects"),
        "bus" => ("org.freedesktop.DBus", "GetId"),
        "introspect" => ("org.freedesktop.DBus.Introspectable", "Introspect"),
        "setup" | "hang" => (MANAGER, "SetupLoop"),
        other => bail!("no such flood: {other}"),
    };
    let file = match (kind, path) {
        ("setup", Some(path)) => Some(open("regular", path)?),
        ("hang", _) => Some(open("stdin", Path::new("-"))?),
        _ => None,
    };
    let destination = if kind == "bus" { "org.freedesktop.DBus" } else { BUS_NAME };
    let proxy = zbus::Proxy::new(connection, destination, ROOT_PATH, interface).await?;
    let calls = (0..CALLS).map(|_| async {
        loop {
            let options = HashMap::<String, Variant<'static>>::new();
            let _refused: zbus::Result<Option<()>> = match (kind, &file) {
                ("list", _) => proxy.call_with_flags(method, flags, &(options,)).await,
                ("list-all", _) => {
                    let options = HashMap::from([("all", Variant::from(true))]);
                    proxy.call_with_flags(method, flags, &(options,)).await
                }
                ("properties", _) => proxy.call_with_flags(method, flags, &(MANAGER,)).await,
                (_, Some(file)) => {
                    proxy.call_with_flags(method, flags, &(Fd::from(file.as_fd()), options)).await
                }
                _ => proxy.call_with_flags(method, flags, &()).await,
            };
        }
    });
    let ended: Vec<()> = futures_util::future::join_all(calls).await;
    Ok(ended.len().into())
}

/// The number of lost calls.
async fn storm(connection: &Connection, rounds: u64, calls: u64, moments: Range<u64>) -> usize {
    let mut lost = 0;
    for _ in 0..rounds {
        let moment = fastrand::u64(moments.clone());
        let round = (0..calls).map(|_| {
            let moment = Duration::from_millis(moment + fastrand::u64(..20));
            async move {
                tokio::time::sleep(moment).await;
                let body = (MANAGER, "Version");
                let flags = MethodFlags::empty();
                call::<_, OwnedVariant>(connection, ROOT_PATH, PROPERTIES, "Get", flags, &body).await
            }
        });
        lost += futures_util::future::join_all(round).await.iter().filter(|answer| answer.is_err()).count();
    }
    lost
}

/// The number of calls that were not answered with the daemon's refusal.
async fn burst(connection: &Connection, calls: usize, path: &Path) -> Result<usize> {
    let file = open("regular", path)?;
    let past_the_end = std::fs::metadata(path)?.len() + 512;
    let calls = (0..calls).map(|_| async {
        let options = HashMap::from([("offset", Variant::from(past_the_end))]);
        let body = (Fd::from(file.as_fd()), options);
        call::<_, (OwnedObjectPath, String)>(
            connection,
            ROOT_PATH,
            MANAGER,
            "SetupLoop",
            MethodFlags::empty(),
            &body,
        )
        .await
    });
    let answers = futures_util::future::join_all(calls).await;
    let is_refusal =
        |answer: &Result<_>| answer.as_ref().is_err_and(|error| format!("{error:?}").contains("InvalidArgs"));
    Ok(answers.iter().filter(|answer| !is_refusal(answer)).count())
}

async fn change(
    connection: &Connection,
    path: &str,
    method: &str,
    argument: Option<&OsStr>,
    flags: MethodFlags,
) -> Result<()> {
    let Some(argument) = argument else {
        return call(connection, path, ATTACHMENT, method, flags, &()).await;
    };
    let (signature, value) =
        argument.to_str().and_then(|argument| argument.split_once(':')).context("not sig:value")?;
    match signature {
        "b" => call(connection, path, ATTACHMENT, method, flags, &(value.parse::<bool>()?,)).await,
        "u" => call(connection, path, ATTACHMENT, method, flags, &(value.parse::<u32>()?,)).await,
        "s" => call(connection, path, ATTACHMENT, method, flags, &(value,)).await,
        "h" => {
            let file = OwnedFd::from(File::open(value)?);
            call(connection, path, ATTACHMENT, method, flags, &(Fd::from(file.as_fd()),)).await
        }
        other => bail!("no such type: {other}"),
    }
}

async fn call<B, R>(
    connection: &Connection,
    path: &str,
    interface: &str,
    method: &str,
    flags: MethodFlags,
    body: &B,
) -> Result<R>
where
    B: serde::Serialize + DynamicType,
    R: for<'d> zbus::wire::DynamicDeserialize<'d>,
{
    let proxy = zbus::Proxy::new(connection, BUS_NAME, path, interface).await?;
    proxy.call_with_flags(method, flags, body).await?.context("no reply")
}

fn shown(properties: &HashMap<String, OwnedVariant>) -> Value {
    properties
        .iter()
        .map(|(name, value)| (name.clone(), value.to_string().into()))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn open(kind: &str, path: &Path) -> Result<OwnedFd> {
    let read_write = || File::options().read(true).write(true).open(path);
    let flagged = |flag: OFlag| File::options().read(true).custom_flags(flag.bits()).open(path);
    Ok(match kind {
        "regular" | "block" => read_write()?.into(),
        "rdonly" | "dir" => File::open(path)?.into(),
        "wronly" => File::options().write(true).open(path)?.into(),
        "opath" => flagged(OFlag::O_PATH)?.into(),
        "direct" => flagged(OFlag::O_DIRECT)?.into(),
        "null" => File::options().read(true).write(true).open("/dev/null")?.into(),
        // The other ends may close: the type of the descriptor stays the same.
        "pipe" => std::io::pipe()?.0.into(),
        "socket" => std::os::unix::net::UnixStream::pair()?.0.into(),
        "memfd" => {
            let memory =
                nix::sys::memfd::memfd_create("loopd-probe", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
            let file = File::from(memory);
            file.set_len(1 << 20)?;
            file.into()
        }
        "unlinked" => {
            let file = read_write()?;
            std::fs::remove_file(path)?;
            file.into()
        }
        "stdin" => std::io::stdin().as_fd().try_clone_to_owned()?,
        other => bail!("no such kind of file: {other}"),
    })
}

/// `key=sig:value` arguments, with any keys and types.
fn options(arguments: &[OsString]) -> Result<HashMap<String, Variant<'static>>> {
    arguments.iter().map(|argument| option(argument)).collect()
}

fn option(argument: &OsStr) -> Result<(String, Variant<'static>)> {
    let parts = || {
        let (key, typed) = argument.to_str()?.split_once('=')?;
        let (signature, value) = typed.split_once(':')?;
        Some((key, signature, value.to_owned()))
    };
    let (key, signature, value) = parts().with_context(|| format!("{argument:?} is not key=sig:value"))?;
    let variant = match signature {
        "b" => Variant::from(value.parse::<bool>()?),
        "y" => Variant::from(value.parse::<u8>()?),
        "i" => Variant::from(value.parse::<i32>()?),
        "u" => Variant::from(value.parse::<u32>()?),
        "x" => Variant::from(value.parse::<i64>()?),
        "t" => Variant::from(value.parse::<u64>()?),
        "d" => Variant::from(value.parse::<f64>()?),
        "s" => Variant::from(value),
        "as" => Variant::from(vec![value]),
        "h" => Variant::from(Fd::from(OwnedFd::from(File::open(value)?))),
        other => bail!("no such type: {other}"),
    };
    Ok((key.to_owned(), variant))
}
