//! The shipped XML matches the daemon's introspection.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use loopd_dbus::names::{ATTACHMENT, BUS_NAME, CLEARTEXT, ENCRYPTED, MANAGER, PARTITION, ROOT_PATH, VOLUME};
use loopd_dbus::{
    AttachOptions, AttachmentProperties, CleartextProperties, EncryptedProperties, PartitionProperties,
    VolumeProperties,
};
use loopd_tests::Outcome;
use loopd_tests::bus::repository;
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::table::Gpt;
use roxmltree::{Document, Node, ParsingOptions};

loopd_tests::tests! {
    "introspection";
    Setup::None => [shipped_xml_matches_the_daemon, properties_match_the_contract, introspection_shows_the_object_tree];
}

const EMITS: &str = "org.freedesktop.DBus.Property.EmitsChangedSignal";

/// The members of an interface, with the parts that a caller depends on.
type Members = BTreeMap<String, String>;

fn interface(xml: &str, name: &str) -> anyhow::Result<Members> {
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    let document = Document::parse_with_options(xml, options)?;
    let found = document
        .descendants()
        .find(|node| node.has_tag_name("interface") && node.attribute("name") == Some(name))
        .with_context(|| format!("no interface {name} in {xml}"))?;
    Ok(found.children().filter(Node::is_element).filter_map(member).collect())
}

fn member(node: Node<'_, '_>) -> Option<(String, String)> {
    let kind = node.tag_name().name();
    let attribute = |node: Node<'_, '_>, name| node.attribute(name).unwrap_or_default().to_owned();
    let described = match kind {
        "method" | "signal" => {
            let arguments = node.children().filter(|child| child.has_tag_name("arg")).map(|argument| {
                let [name, signature, direction] =
                    ["name", "type", "direction"].map(|name| attribute(argument, name));
                format!("{direction} {signature} {name}")
            });
            arguments.collect::<Vec<_>>().join(", ")
        }
        "property" => {
            let emits = node.children().find(|child| child.attribute("name") == Some(EMITS));
            let emits = emits.map_or("true".to_owned(), |annotation| attribute(annotation, "value"));
            format!("{} {}, emits {emits}", attribute(node, "access"), attribute(node, "type"))
        }
        _ => return None,
    };
    Some((format!("{kind} {}", attribute(node, "name")), described))
}

async fn introspect(fixture: &Fixture, path: &str) -> anyhow::Result<String> {
    let proxy = zbus::Proxy::new(&fixture.connection, BUS_NAME, path, MANAGER).await?;
    Ok(proxy.introspect().await?)
}

fn shipped(name: &str) -> anyhow::Result<Members> {
    let file = repository().join(format!("dbus/{name}.xml"));
    interface(&std::fs::read_to_string(file)?, name)
}

/// An image with one partition.
fn partitioned(fixture: &Fixture) -> anyhow::Result<Image> {
    let image = Image::sparse(&fixture.directory, "image", 4 * MIB)?;
    Gpt::new(&[(2048, 4095)]).write(&image)?;
    Ok(image)
}

async fn shipped_xml_matches_the_daemon(fixture: &mut Fixture) -> Outcome {
    assert_eq!(interface(&introspect(fixture, ROOT_PATH).await?, MANAGER)?, shipped(MANAGER)?);
    let image = partitioned(fixture)?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let partition = format!("{}/p1", attached.path);
    // The partition is empty, and may be encrypted.
    for (path, names) in
        [(attached.path.as_str(), &[ATTACHMENT, VOLUME][..]), (&partition, &[PARTITION, VOLUME, ENCRYPTED])]
    {
        let own = introspect(fixture, path).await?;
        for &name in names {
            assert_eq!(interface(&own, name)?, shipped(name)?, "{name} of {path}");
        }
    }
    assert!(shipped(ATTACHMENT)?.contains_key("method RescanPartitions"));
    fixture.detach(&attached).await
}

async fn properties_match_the_contract(_: &mut Fixture) -> Outcome {
    for (interface, dictionary) in [
        (ATTACHMENT, AttachmentProperties::default().to_dict()),
        (VOLUME, VolumeProperties::default().to_dict()),
        (PARTITION, PartitionProperties::default().to_dict()),
        (ENCRYPTED, EncryptedProperties::default().to_dict()),
        (CLEARTEXT, CleartextProperties::default().to_dict()),
    ] {
        let types: BTreeSet<String> = dictionary
            .iter()
            .map(|(name, value)| format!("property {name}: read {}", value.value_signature()))
            .collect();
        let shipped: BTreeSet<String> = shipped(interface)?
            .iter()
            .filter(|(name, _)| name.starts_with("property "))
            .map(|(name, described)| format!("{name}: {}", described.split(',').next().unwrap_or_default()))
            .collect();
        assert_eq!(shipped, types, "{interface}");
    }
    Ok(())
}

async fn introspection_shows_the_object_tree(fixture: &mut Fixture) -> Outcome {
    let image = partitioned(fixture)?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let sequence: u64 = attached.device.number("diskseq")?;
    for (path, child) in [
        ("/".to_owned(), "org".to_owned()),
        (ROOT_PATH.to_owned(), "attachment".to_owned()),
        (format!("{ROOT_PATH}/attachment"), sequence.to_string()),
        (format!("{ROOT_PATH}/attachment/{sequence}"), "p1".to_owned()),
    ] {
        let xml = introspect(fixture, &path).await?;
        assert!(xml.contains(&format!("<node name=\"{child}\"")), "{path} has no {child}: {xml}");
    }
    fixture.detach(&attached).await
}
