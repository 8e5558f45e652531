//! Other D-Bus clients: busctl, gdbus, python3-dbus.

use anyhow::Context as _;
use loopd_dbus::names::ROOT_PATH;
use loopd_dbus::{AttachOptions, Lifetime};
use loopd_tests::fixture::{Attached, Fixture};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{needs, output};
use loopd_tests::{Outcome, skip};

loopd_tests::tests! {
    "foreign";
    Setup::None => [busctl_can_list_and_detach, busctl_shows_all_members, gdbus_can_list_and_detach, python_can_attach, bus_policy_denies_unknown_interfaces];
}

/// Runs a program on the test's bus; returns its output.
async fn run(fixture: &Fixture, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = fixture.command(program);
    command.args(arguments);
    let output = output(command).await?;
    let errors = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{program} {arguments:?}: {}: {errors}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

async fn attach(fixture: &Fixture, image: &Image) -> anyhow::Result<Attached> {
    let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    fixture.attach(&image.open()?, &options).await
}

async fn busctl_can_list_and_detach(fixture: &mut Fixture) -> Outcome {
    needs("busctl")?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let manager = ["call", "org.loopd1", ROOT_PATH, "org.loopd1.Manager"];
    let call = async |arguments: &[&str]| run(fixture, "busctl", &[&manager[..], arguments].concat()).await;

    let attached = attach(fixture, &image).await?;
    let node = attached.device.node();
    let listed = call(&["List", "a{sv}", "1", "all", "b", "true"]).await?;
    assert!(listed.contains(attached.path.as_str()) && listed.contains(&node), "{listed}");
    call(&["Detach", "sa{sv}", &node, "1", "lazy", "b", "false"]).await?;
    assert!(!attached.device.bound());

    let attached = attach(fixture, &image).await?;
    let path = attached.path.as_str();
    run(fixture, "busctl", &["call", "org.loopd1", path, "org.loopd1.Attachment", "Detach", "a{sv}", "0"])
        .await?;
    assert!(!attached.device.bound());

    let version =
        run(fixture, "busctl", &["get-property", "org.loopd1", ROOT_PATH, "org.loopd1.Manager", "Version"])
            .await?;
    assert_eq!(version.trim(), format!("s {:?}", env!("CARGO_PKG_VERSION")));
    Ok(())
}

async fn busctl_shows_all_members(fixture: &mut Fixture) -> Outcome {
    needs("busctl")?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = attach(fixture, &image).await?;
    let tree = run(fixture, "busctl", &["tree", "--list", "org.loopd1"]).await?;
    assert!(tree.lines().any(|line| line == attached.path.as_str()), "{tree}");
    let shown = run(fixture, "busctl", &["introspect", "org.loopd1", attached.path.as_str()]).await?;
    for word in ["org.loopd1.Attachment", "org.loopd1.Volume", ".DiskSequence", ".MountPoints", ".Detach"] {
        assert!(shown.contains(word), "no {word} in {shown}");
    }
    fixture.detach(&attached).await
}

async fn gdbus_can_list_and_detach(fixture: &mut Fixture) -> Outcome {
    needs("gdbus")?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let call = async |path: &str, method: &str, arguments: &[&str]| {
        let start = ["call", "--system", "--dest", "org.loopd1", "--object-path", path, "--method", method];
        run(fixture, "gdbus", &[&start[..], arguments].concat()).await
    };

    let attached = attach(fixture, &image).await?;
    let node = attached.device.node();
    let listed = call(ROOT_PATH, "org.loopd1.Manager.List", &["{'all': <true>}"]).await?;
    assert!(listed.contains(attached.path.as_str()), "{listed}");
    call(ROOT_PATH, "org.loopd1.Manager.Detach", &[&node, "{}"]).await?;
    assert!(!attached.device.bound());

    let attached = attach(fixture, &image).await?;
    call(attached.path.as_str(), "org.loopd1.Attachment.Detach", &["{'lazy': <true>}"]).await?;
    fixture.gone(&attached).await?;

    let arguments = ["introspect", "--system", "--dest", "org.loopd1", "--object-path", ROOT_PATH];
    let shown = run(fixture, "gdbus", &arguments).await?;
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

async fn python_can_attach(fixture: &mut Fixture) -> Outcome {
    // Debian's python3, for which python3-dbus is built.
    let python = "/usr/bin/python3";
    let mut probe = fixture.command(python);
    probe.args(["-c", "import dbus"]);
    if !output(probe).await.is_ok_and(|output| output.status.success()) {
        return skip("python3-dbus is not installed");
    }
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let path = image.path.to_str().context("path")?;
    let device = run(fixture, python, &["-c", SCRIPT, path]).await?;
    assert!(device.starts_with("/dev/loop"), "{device}");
    Ok(())
}

/// The shipped bus policy allows only the members of the contract.
async fn bus_policy_denies_unknown_interfaces(fixture: &mut Fixture) -> Outcome {
    let reply = fixture
        .connection
        .call_method(Some("org.loopd1"), ROOT_PATH, Some("org.loopd1.Other"), "Call", &())
        .await;
    match reply {
        Err(zbus::Error::FDO(error)) if matches!(*error, zbus::fdo::Error::AccessDenied(_)) => Ok(()),
        other => anyhow::bail!("the bus let it through: {other:?}"),
    }
}
