//! Clients that are not ours: busctl, gdbus, python3-dbus.

use anyhow::Context as _;
use loopd_dbus::names::ROOT_PATH;
use loopd_dbus::{AttachOptions, Lifetime};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{needs, output};
use loopd_tests::world::{Attached, World};
use loopd_tests::{Outcome, skip};

loopd_tests::tests! {
    "foreign";
    Setup::None => [busctl, busctl_shows_everything, gdbus, python, unknown_interface_is_kept_out];
}

/// Runs a program on the test's bus; gives what it printed.
async fn run(world: &World, program: &str, words: &[&str]) -> anyhow::Result<String> {
    let mut command = world.command(program);
    command.args(words);
    let output = output(command).await?;
    let errors = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{program} {words:?}: {}: {errors}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

async fn attach(world: &World, image: &Image) -> anyhow::Result<Attached> {
    let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    world.attach(&image.open()?, &options).await
}

async fn busctl(world: &mut World) -> Outcome {
    needs("busctl")?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let manager = ["call", "org.loopd1", ROOT_PATH, "org.loopd1.Manager"];
    let call = async |words: &[&str]| run(world, "busctl", &[&manager[..], words].concat()).await;

    let attached = attach(world, &image).await?;
    let node = attached.device.node();
    let listed = call(&["List", "a{sv}", "1", "all", "b", "true"]).await?;
    assert!(listed.contains(attached.path.as_str()) && listed.contains(&node), "{listed}");
    call(&["Detach", "sa{sv}", &node, "1", "lazy", "b", "false"]).await?;
    assert!(!attached.device.bound());

    let attached = attach(world, &image).await?;
    let path = attached.path.as_str();
    run(world, "busctl", &["call", "org.loopd1", path, "org.loopd1.Attachment", "Detach", "a{sv}", "0"])
        .await?;
    assert!(!attached.device.bound());

    let version =
        run(world, "busctl", &["get-property", "org.loopd1", ROOT_PATH, "org.loopd1.Manager", "Version"])
            .await?;
    assert_eq!(version.trim(), format!("s {:?}", env!("CARGO_PKG_VERSION")));
    Ok(())
}

async fn busctl_shows_everything(world: &mut World) -> Outcome {
    needs("busctl")?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let attached = attach(world, &image).await?;
    let tree = run(world, "busctl", &["tree", "--list", "org.loopd1"]).await?;
    assert!(tree.lines().any(|line| line == attached.path.as_str()), "{tree}");
    let shown = run(world, "busctl", &["introspect", "org.loopd1", attached.path.as_str()]).await?;
    for word in ["org.loopd1.Attachment", "org.loopd1.Volume", ".DiskSequence", ".MountPoints", ".Detach"] {
        assert!(shown.contains(word), "no {word} in {shown}");
    }
    world.detach(&attached).await
}

async fn gdbus(world: &mut World) -> Outcome {
    needs("gdbus")?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let call = async |path: &str, method: &str, words: &[&str]| {
        let start = ["call", "--system", "--dest", "org.loopd1", "--object-path", path, "--method", method];
        run(world, "gdbus", &[&start[..], words].concat()).await
    };

    let attached = attach(world, &image).await?;
    let node = attached.device.node();
    let listed = call(ROOT_PATH, "org.loopd1.Manager.List", &["{'all': <true>}"]).await?;
    assert!(listed.contains(attached.path.as_str()), "{listed}");
    call(ROOT_PATH, "org.loopd1.Manager.Detach", &[&node, "{}"]).await?;
    assert!(!attached.device.bound());

    let attached = attach(world, &image).await?;
    call(attached.path.as_str(), "org.loopd1.Attachment.Detach", &["{'lazy': <true>}"]).await?;
    world.gone(&attached).await?;

    let words = ["introspect", "--system", "--dest", "org.loopd1", "--object-path", ROOT_PATH];
    let shown = run(world, "gdbus", &words).await?;
    assert!(shown.contains("interface org.loopd1.Manager"), "{shown}");
    Ok(())
}

/// The one of the three that can send a descriptor.
const SCRIPT: &str = r#"
import dbus, os, sys
bus = dbus.SystemBus()
manager = dbus.Interface(bus.get_object("org.loopd1", "/org/loopd1"), "org.loopd1.Manager")
fd = os.open(sys.argv[1], os.O_RDWR)
options = dbus.Dictionary({"size-limit": dbus.UInt64(65536), "reference": "python"}, signature="sv")
path, device = manager.SetupLoop(dbus.types.UnixFd(fd), options)
properties = dbus.Interface(bus.get_object("org.loopd1", path), "org.freedesktop.DBus.Properties")
assert properties.Get("org.loopd1.Attachment", "Device") == device
assert properties.Get("org.loopd1.Attachment", "SizeLimit") == 65536
assert properties.GetAll("org.loopd1.Volume")["Size"] == 65536
file = dbus.Dictionary({"file": dbus.types.UnixFd(fd)}, signature="sv")
listed = manager.List(file)
assert [str(entry[0]) for entry in listed] == [str(path)], listed
assert listed[0][1]["Reference"] == "python", listed
try:
    manager.SetupLoop(dbus.types.UnixFd(fd), dbus.Dictionary({"offset": dbus.UInt32(0)}, signature="sv"))
    sys.exit("an offset of type u was taken")
except dbus.DBusException as error:
    assert error.get_dbus_name() == "org.freedesktop.DBus.Error.InvalidArgs", error
manager.Detach(device, dbus.Dictionary({}, signature="sv"))
assert not manager.List(file)
print(device)
"#;

async fn python(world: &mut World) -> Outcome {
    // Debian's own, which is the one that python3-dbus is for.
    let python = "/usr/bin/python3";
    let mut probe = world.command(python);
    probe.args(["-c", "import dbus"]);
    if !output(probe).await.is_ok_and(|output| output.status.success()) {
        return skip("python3-dbus is not installed");
    }
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let path = image.path.to_str().context("path")?;
    let device = run(world, python, &["-c", SCRIPT, path]).await?;
    assert!(device.starts_with("/dev/loop"), "{device}");
    Ok(())
}

/// The shipped bus policy lets through what the contract has, and nothing else.
async fn unknown_interface_is_kept_out(world: &mut World) -> Outcome {
    let reply = world
        .connection
        .call_method(Some("org.loopd1"), ROOT_PATH, Some("org.loopd1.Other"), "Call", &())
        .await;
    match reply {
        Err(zbus::Error::FDO(error)) if matches!(*error, zbus::fdo::Error::AccessDenied(_)) => Ok(()),
        other => anyhow::bail!("the bus let it through: {other:?}"),
    }
}
