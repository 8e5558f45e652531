//! `org.loopd1.Partition`.

use loopd_dbus::PartitionProperties;
use zbus::interface;
use zbus::wire::OwnedObjectPath;

use super::shared_properties::SharedProperties;

/// The interface, on a partition object.
pub struct Partition {
    properties: SharedProperties<PartitionProperties>,
}

impl Partition {
    /// The interface of a partition. The publisher updates the properties.
    pub fn new(properties: SharedProperties<PartitionProperties>) -> Self {
        Self { properties }
    }
}

#[interface(name = "org.loopd1.Partition", introspection_docs = false)]
impl Partition {
    #[zbus(property(emits_changed_signal = "const"))]
    fn number(&self) -> u32 {
        self.properties.read().number
    }

    #[zbus(property)]
    fn offset(&self) -> u64 {
        self.properties.read().offset
    }

    #[zbus(property)]
    fn size(&self) -> u64 {
        self.properties.read().size
    }

    #[zbus(property)]
    fn table(&self) -> String {
        self.properties.read().table.clone()
    }

    #[zbus(property, name = "Type")]
    fn kind(&self) -> String {
        self.properties.read().kind.clone()
    }

    #[zbus(property)]
    fn uuid(&self) -> String {
        self.properties.read().uuid.clone()
    }

    #[zbus(property)]
    fn label(&self) -> String {
        self.properties.read().label.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn attachment(&self) -> OwnedObjectPath {
        self.properties.read().attachment.clone()
    }
}
