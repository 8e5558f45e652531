//! Publishes the encryption of a volume: the interface `org.loopd1.Encrypted`, which comes and goes, and the object of the
//! cleartext.

use loopd_dbus::names::{ENCRYPTED, VOLUME, cleartext_path, volume_path};
use loopd_dbus::{CleartextProperties, EncryptedProperties, VolumeProperties};

use super::board::{Board, InterfaceChange};
use super::cleartext::Cleartext;
use super::encrypted::Encrypted;
use super::interfaces::{Interfaces, Shared};
use super::volume::Volume;
use super::{convert, introspection};
use loopd_engine::kernel::DiskSequence;
use loopd_engine::{CleartextSnapshot, VolumeId};

/// `ID_FS_USAGE` of an encrypted volume.
const CRYPTO: &str = "crypto";

/// What is published about the encryption of a volume.
pub struct Encryption {
    attachment: DiskSequence,
    partition: Option<u32>,
    encrypted: Option<Shared<EncryptedProperties>>,
    cleartext: Option<PublishedCleartext>,
}

/// The properties of the object of a cleartext.
struct PublishedCleartext {
    cleartext: Shared<CleartextProperties>,
    volume: Shared<VolumeProperties>,
}

/// Whether a volume may be encrypted: volumes of VeraCrypt, and those with a detached header, have no signature, and
/// look empty.
#[must_use]
pub fn may_be_encrypted(usage: &str, has_partitions: bool) -> bool {
    usage == CRYPTO || (usage.is_empty() && !has_partitions)
}

impl Encryption {
    /// Nothing is published yet.
    #[must_use]
    pub fn new(attachment: DiskSequence, partition: Option<u32>) -> Self {
        Self { attachment, partition, encrypted: None, cleartext: None }
    }

    /// Serves the interface of a new object if the volume may be encrypted. The object is announced with it afterwards.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn serve(&mut self, board: &Board, may_be_encrypted: bool) -> zbus::Result<()> {
        if may_be_encrypted && self.encrypted.is_none() {
            let properties = Shared::new(EncryptedProperties::default());
            let object = Encrypted::new(board.context().clone(), self.volume(), properties.clone());
            board.server().at(self.path(), object).await?;
            self.encrypted = Some(properties);
        }
        Ok(())
    }

    /// The interface of the object, if it has it.
    #[must_use]
    pub fn encrypted(&self) -> Option<Shared<EncryptedProperties>> {
        self.encrypted.clone()
    }

    /// Whether the volume is unlocked.
    #[must_use]
    pub fn is_unlocked(&self) -> bool {
        self.cleartext.is_some()
    }

    /// Adds or removes the interface of an announced object, whose other interfaces are `others`. It stays while the
    /// volume is unlocked.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn set_encrypted(
        &mut self,
        board: &Board,
        may_be_encrypted: bool,
        others: Interfaces,
    ) -> zbus::Result<()> {
        let is_shown = may_be_encrypted || self.is_unlocked();
        if is_shown == self.encrypted.is_some() {
            return Ok(());
        }
        let path = self.path();
        let change = if is_shown {
            self.serve(board, true).await?;
            InterfaceChange::Added(Interfaces::default().with_encrypted(self.encrypted()))
        } else {
            self.encrypted = None;
            board.server().remove::<Encrypted, _>(&path).await?;
            InterfaceChange::Removed(ENCRYPTED)
        };
        board.announce_change(&path, others.with_encrypted(self.encrypted()), change).await
    }

    /// Adds, changes or removes the object of the cleartext.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn set_cleartext(
        &mut self,
        board: &Board,
        cleartext: Option<&CleartextSnapshot>,
    ) -> zbus::Result<()> {
        let new = cleartext.map(|snapshot| convert::cleartext(self.attachment, self.partition, snapshot));
        let is_same = |known: &PublishedCleartext| new.as_ref() == Some(&*known.cleartext.read());
        if !self.cleartext.as_ref().is_some_and(is_same) {
            self.remove_cleartext(board).await?;
        }
        let Some((properties, snapshot)) = new.zip(cleartext) else { return Ok(()) };
        let volume = convert::cleartext_volume(snapshot);
        if let Some(known) = &self.cleartext {
            let changes = volume.changes_since(&known.volume.replace(volume.clone()));
            return board.emit(&self.cleartext_path(), VOLUME, changes).await;
        }
        self.add_cleartext(board, properties, volume).await
    }

    async fn add_cleartext(
        &mut self,
        board: &Board,
        cleartext: CleartextProperties,
        volume: VolumeProperties,
    ) -> zbus::Result<()> {
        let path = self.cleartext_path();
        let (cleartext, volume) = (Shared::new(cleartext), Shared::new(volume));
        let (server, context) = (board.server(), board.context());
        let id = VolumeId { is_cleartext: true, ..self.volume() };
        server.at(&path, Volume::new(context.clone(), id, volume.clone())).await?;
        server.at(&path, Cleartext::new(cleartext.clone())).await?;
        introspection::serve(server, &path, context).await?;
        board.announce(&path, Interfaces::cleartext(cleartext.clone(), volume.clone())).await?;
        self.cleartext = Some(PublishedCleartext { cleartext, volume });
        self.set_property(board, EncryptedProperties { cleartext: path.into() }).await
    }

    /// Removes the object of the cleartext, if there is one.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn remove_cleartext(&mut self, board: &Board) -> zbus::Result<()> {
        if self.cleartext.take().is_none() {
            return Ok(());
        }
        self.set_property(board, EncryptedProperties::default()).await?;
        let path = self.cleartext_path();
        board.server().remove::<Cleartext, _>(&path).await?;
        board.server().remove::<Volume, _>(&path).await?;
        board.withdraw(&path).await
    }

    /// Removes all of it, with the object of the volume.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn remove(mut self, board: &Board) -> zbus::Result<()> {
        self.remove_cleartext(board).await?;
        if self.encrypted.take().is_some() {
            board.server().remove::<Encrypted, _>(self.path()).await?;
        }
        Ok(())
    }

    async fn set_property(&self, board: &Board, new: EncryptedProperties) -> zbus::Result<()> {
        let Some(encrypted) = &self.encrypted else { return Ok(()) };
        let changes = new.changes_since(&encrypted.replace(new.clone()));
        board.emit(&self.path(), ENCRYPTED, changes).await
    }

    fn volume(&self) -> VolumeId {
        VolumeId { attachment: self.attachment, partition: self.partition, is_cleartext: false }
    }

    fn path(&self) -> zbus::wire::ObjectPath<'static> {
        volume_path(self.attachment.0, self.partition)
    }

    fn cleartext_path(&self) -> zbus::wire::ObjectPath<'static> {
        cleartext_path(self.attachment.0, self.partition)
    }
}

#[cfg(test)]
mod tests {
    use super::may_be_encrypted;

    #[test]
    fn encrypted_volumes_and_those_without_a_signature_may_be_encrypted() {
        for (usage, has_partitions, expected) in [
            ("crypto", false, true),
            ("crypto", true, true),
            ("", false, true),
            ("", true, false),
            ("filesystem", false, false),
            ("raid", false, false),
            ("other", false, false),
        ] {
            assert_eq!(may_be_encrypted(usage, has_partitions), expected, "{usage:?} {has_partitions}");
        }
    }
}
