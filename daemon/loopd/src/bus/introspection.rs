//! `org.freedesktop.DBus.Introspectable`: describes an object and names its children. The library's implementation
//! also describes everything below the object.

use std::fmt::Write;

use loopd_dbus::names::{ATTACHMENT_PREFIX, ROOT_PATH};
use loopd_dbus::{Error, ErrorKind, ErrorReply};
use zbus::interface;
use zbus::message::Header;
use zbus::object_server::{Interface, ObjectServer};

use super::attachment::Attachment;
use super::authority::Request;
use super::call_error::CallError;
use super::cleartext::Cleartext;
use super::context::{Call, Context, Operation};
use super::encrypted::Encrypted;
use super::large_replies::LargeReply;
use super::manager::Manager;
use super::object_manager::ObjectManager;
use super::partition::Partition;
use super::volume::Volume;

/// The limit of children in a description. Users have as many attachments as their limits allow, but other
/// programs attach without limit.
const MAX_CHILDREN: usize = 16 << 10;

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

/// The interface, on any object.
pub struct Introspection {
    context: Context,
}

/// Replaces the library's interface on this object.
///
/// # Errors
/// There is no such object.
pub async fn serve(server: &ObjectServer, path: &str, context: &Context) -> zbus::Result<()> {
    if server.interface::<_, Introspection>(path).await.is_ok() {
        return Ok(());
    }
    server.remove_named(path, Introspection::name()).await?;
    server.at(path, Introspection { context: context.clone() }).await.map(drop)
}

/// Replaces the library's interface on the object above the attachments.
///
/// # Errors
/// There is no such object.
pub async fn serve_above(server: &ObjectServer, context: &Context) -> zbus::Result<()> {
    serve(server, ATTACHMENT_PREFIX.trim_end_matches('/'), context).await
}

#[interface(name = "org.freedesktop.DBus.Introspectable", introspection_docs = false)]
impl Introspection {
    #[zbus(out_args("xml_data"))]
    async fn introspect(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(object_server)] server: &ObjectServer,
    ) -> Result<LargeReply<String>, ErrorReply> {
        let path = header.path().map(|path| path.as_str()).unwrap_or_default();
        self.context.call(&header, Introspect { server, path }).await
    }
}

struct Introspect<'s> {
    server: &'s ObjectServer,
    path: &'s str,
}

impl Operation for Introspect<'_> {
    /// The description of the object's interfaces.
    type Object = String;
    type Output = LargeReply<String>;
    const CHANGES_ATTACHMENTS: bool = false;

    fn method(&self) -> &'static str {
        "Introspect"
    }

    async fn look_up(&self, _call: &Call<'_>) -> Result<String, CallError> {
        let mut xml = START.to_owned();
        describe(self.server, self.path, &mut xml)
            .await
            .map_err(|_| Error::new(ErrorKind::UnknownObject, "the object does not exist any more"))?;
        Ok(xml)
    }

    fn requests<'a>(&self, _xml: &'a String) -> Vec<Request<'a>> {
        Vec::new()
    }

    async fn run(self, call: &Call<'_>, mut xml: String) -> Result<Self::Output, CallError> {
        let children = || {
            call.objects.write_children(self.path, MAX_CHILDREN, &mut xml);
            xml.push_str("</node>\n");
            xml
        };
        Ok(call.large_replies.build(children).await)
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
        Some(below) if below.ends_with("/cleartext") => {
            write_interface::<Cleartext>(server, path, xml).await?;
            write_interface::<Volume>(server, path, xml).await
        }
        Some(below) if below.contains('/') => {
            write_interface::<Partition>(server, path, xml).await?;
            write_volume(server, path, xml).await
        }
        Some(_) => {
            write_interface::<Attachment>(server, path, xml).await?;
            write_volume(server, path, xml).await
        }
    }
}

/// Describes the interfaces of a volume, which may be encrypted.
async fn write_volume(server: &ObjectServer, path: &str, xml: &mut String) -> zbus::Result<()> {
    write_interface::<Volume>(server, path, xml).await?;
    match write_interface::<Encrypted>(server, path, xml).await {
        Err(zbus::Error::InterfaceNotFound) => Ok(()),
        written => written,
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
