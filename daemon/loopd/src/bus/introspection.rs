//! `org.freedesktop.DBus.Introspectable`: an object and the names of its children, where the library's
//! own describes everything below the object as well.

use std::fmt::Write;

use loopd_dbus::names::{ATTACHMENT_PREFIX, ROOT_PATH};
use loopd_dbus::{Error, ErrorKind, ErrorReply};
use zbus::interface;
use zbus::message::Header;
use zbus::object_server::{Interface, ObjectServer};

use super::Room;
use super::answers::Answer;
use super::attachment::Attachment;
use super::manager::Manager;
use super::objects::ObjectManager;
use super::partition::Partition;
use super::volume::Volume;

/// How many children are named. A user has as many attachments as the limits allow; what other programs
/// attach is shown as well.
const MOST_CHILDREN: usize = 16 << 10;

const START: &str = r#"<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">
<node>
  <interface name="org.freedesktop.DBus.Introspectable">
    <method name="Introspect">
      <arg name="xml_data" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="org.freedesktop.DBus.Peer">
    <method name="Ping"/>
    <method name="GetMachineId">
      <arg name="machine_uuid" type="s" direction="out"/>
    </method>
  </interface>
"#;

const PROPERTIES: &str = r#"  <interface name="org.freedesktop.DBus.Properties">
    <method name="Get">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="properties" type="a{sv}" direction="out"/>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface_name" type="s"/>
      <arg name="changed_properties" type="a{sv}"/>
      <arg name="invalidated_properties" type="as"/>
    </signal>
  </interface>
"#;

/// What an object says of itself.
pub struct Introspection {
    room: Room,
}

/// Takes the place of the library's own at this object, which must be there.
///
/// # Errors
/// There is no such object.
pub async fn serve(server: &ObjectServer, path: &str, room: &Room) -> zbus::Result<()> {
    if server.interface::<_, Introspection>(path).await.is_ok() {
        return Ok(());
    }
    server.remove_named(path, Introspection::name()).await?;
    server.at(path, Introspection { room: room.clone() }).await.map(drop)
}

/// The same at the objects that lead to an attachment.
///
/// # Errors
/// One of them is not there.
pub async fn serve_above(server: &ObjectServer, room: &Room) -> zbus::Result<()> {
    serve(server, ATTACHMENT_PREFIX.trim_end_matches('/'), room).await
}

/// The same at the root object and those above it.
///
/// # Errors
/// One of them is not there.
pub async fn serve_root(server: &ObjectServer, room: &Room) -> zbus::Result<()> {
    for path in ["/", "/org", ROOT_PATH] {
        serve(server, path, room).await?;
    }
    Ok(())
}

#[interface(name = "org.freedesktop.DBus.Introspectable", introspection_docs = false)]
impl Introspection {
    #[zbus(out_args("xml_data"))]
    async fn introspect(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(object_server)] server: &ObjectServer,
    ) -> Result<Answer<String>, ErrorReply> {
        let _caller = self.room.identify(&header).await?;
        let path = header.path().map(|path| path.as_str()).unwrap_or_default();
        let mut xml = START.to_owned();
        describe(server, path, &mut xml)
            .await
            .map_err(|_| Error::new(ErrorKind::UnknownObject, "the object is gone"))?;
        let children = || {
            self.room.objects.write_children(path, MOST_CHILDREN, &mut xml);
            xml.push_str("</node>\n");
            xml
        };
        Ok(self.room.answers.make(children).await)
    }
}

/// Describes the interfaces of an object.
async fn describe(server: &ObjectServer, path: &str, xml: &mut String) -> zbus::Result<()> {
    let below = path.strip_prefix(ATTACHMENT_PREFIX);
    if path != ROOT_PATH && below.is_none() {
        return Ok(());
    }
    xml.push_str(PROPERTIES);
    match below {
        None => {
            write_interface::<ObjectManager>(server, path, xml).await?;
            write_interface::<Manager>(server, path, xml).await
        }
        Some(below) if below.contains('/') => {
            write_interface::<Partition>(server, path, xml).await?;
            write_interface::<Volume>(server, path, xml).await
        }
        Some(_) => {
            write_interface::<Attachment>(server, path, xml).await?;
            write_interface::<Volume>(server, path, xml).await
        }
    }
}

async fn write_interface<I: Interface>(
    server: &ObjectServer,
    path: &str,
    xml: &mut (impl Write + Send),
) -> zbus::Result<()> {
    let interface = server.interface::<_, I>(path).await?;
    interface.get().await.introspect_to_writer(xml, 2);
    Ok(())
}
