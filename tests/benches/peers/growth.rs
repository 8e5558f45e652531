//! The part `growth`: what an attach, a detach, a list and the end of a client cost while others are attached.

use std::time::Instant;

use anyhow::{Context as _, Result};
use loopd_dbus::names::{BUS_NAME, MANAGER, ROOT_PATH};
use loopd_dbus::{ListOptions, proxy::Manager};
use loopd_tests::image::{Image, MIB};
use loopd_tests::loop_ioctl;
use loopd_tests::report::statistics::ratio;
use loopd_tests::report::text_table::{TextTable, figure_or_dash};
use loopd_tests::sysfs::LoopDevice;
use zbus::{Connection, Message};

use crate::ioctls::{self, Ioctls};
use crate::names::{growth, side, table};
use crate::passing::Passing;
use crate::results::{Key, Results};
use crate::scale::{Held, Scale};
use crate::scene::Scene;
use crate::side::{Way, setup_loop, until_free};
use crate::workspace::{Workspace, quiet};

fn key(group: &'static str, side: &'static str, held: Held) -> Key {
    Key { table: table::GROWTH, group, side, column: held.name }
}

/// Measures beside each number of held devices.
pub async fn measure(workspace: &Workspace, scale: &Scale, results: &mut Results) -> Result<()> {
    let scene = Scene::start(workspace, "growth").await?;
    let image = Image::sparse(&scene.directory, "image", MIB)?;
    let (connection, manager) = scene.connect().await?;
    let passing = Passing::connect(scene.bus.address())?;
    let mut observer = Observer { connection, manager, image: &image, passing };
    for &held in scale.held {
        let ends = if scale.ends_once { 1 } else { held.ends };
        for end in 0..ends {
            end_of_floor(&image, held, results).await?;
            let (client, manager) = scene.connect().await?;
            let devices = hold(&manager, &image, held.devices).await?;
            quiet().await?;
            if end == 0 {
                observer.measure(held, scale.growth_rounds, results).await?;
            }
            let start = Instant::now();
            client.close().await?;
            until_all_free(&devices)?;
            results.add_time(key(growth::END, side::LOOPD, held), start.elapsed());
            quiet().await?;
        }
    }
    Ok(())
}

/// What the end of a client is compared with: LOOP_CLR_FD on as many devices.
async fn end_of_floor(image: &Image, held: Held, results: &mut Results) -> Result<()> {
    let (control, file) = (loop_ioctl::control()?, image.open()?);
    let configure = |_| Ok(ioctls::configure(&control, &file)?.0);
    let devices = (0..held.devices).map(configure).collect::<Result<Vec<_>>>()?;
    quiet().await?;
    let start = Instant::now();
    devices.iter().try_for_each(|&device| ioctls::clear(device))?;
    until_all_free(&devices)?;
    results.add_time(key(growth::END, side::IOCTLS, held), start.elapsed());
    quiet().await
}

/// Attaches the image this often, for the client of the manager.
pub async fn hold(manager: &Manager, image: &Image, count: usize) -> Result<Vec<LoopDevice>> {
    let file = image.open()?;
    let mut devices = Vec::new();
    for number in 0..count {
        let attached = setup_loop(manager, &file, false).await;
        devices.push(attached.with_context(|| format!("attachment {number} of {count}"))?);
    }
    Ok(devices)
}

/// Waits until nothing is attached to any of the devices.
pub fn until_all_free(devices: &[LoopDevice]) -> Result<()> {
    devices.iter().try_for_each(|&device| until_free(device))
}

/// A further client, which holds nothing.
struct Observer<'a> {
    connection: Connection,
    manager: Manager,
    image: &'a Image,
    passing: Passing,
}

impl Observer<'_> {
    async fn measure(&mut self, held: Held, rounds: usize, results: &mut Results) -> Result<()> {
        let loopd = |waits| Way::Loopd { manager: self.manager.clone(), waits };
        let ways = [
            (growth::REPLY, side::IOCTLS, Way::Ioctls(Ioctls::new(false)?)),
            (growth::REPLY, side::LOOPD, loopd(false)),
            (growth::PROCESSED, side::IOCTLS, Way::Ioctls(Ioctls::new(true)?)),
            (growth::PROCESSED, side::LOOPD, loopd(true)),
        ];
        for _ in 0..rounds {
            for (group, name, way) in &ways {
                let times = way.round(self.image, 0).await.with_context(|| format!("{name}, {group}"))?;
                results.add_time(key(group, name, held), times.attach);
                // udev has processed the device in each case, so the detaches are alike.
                results.add_time(key(growth::DETACH, name, held), times.detach);
            }
            let start = Instant::now();
            let list = self.list().await?;
            results.add_time(key(growth::LIST, side::LOOPD, held), start.elapsed());
            results.add_time(key(growth::LIST, side::PASSING, held), self.passing.pass(&list)?);
            let start = Instant::now();
            let objects = self.objects().await?;
            results.add_time(key(growth::OBJECTS, side::LOOPD, held), start.elapsed());
            results.add_time(key(growth::OBJECTS, side::PASSING, held), self.passing.pass(&objects)?);
        }
        Ok(())
    }

    /// Until the reply is received; what the client reads of it is its own time.
    async fn list(&self) -> Result<Message> {
        let options = ListOptions::default();
        let body = (options.encode(),);
        Ok(self.connection.call_method(Some(BUS_NAME), ROOT_PATH, Some(MANAGER), "List", &body).await?)
    }

    async fn objects(&self) -> Result<Message> {
        let interface = "org.freedesktop.DBus.ObjectManager";
        let call =
            self.connection.call_method(Some(BUS_NAME), ROOT_PATH, Some(interface), "GetManagedObjects", &());
        Ok(call.await?)
    }
}

/// The table of medians beside each number of held devices.
pub fn table(results: &Results) -> TextTable {
    let columns = results.columns(table::GROWTH);
    let mut headings = vec!["milliseconds, devices held:"];
    headings.extend(&columns);
    headings.push("last/first");
    let mut table = TextTable::new(&headings);
    let measured = results.groups(table::GROWTH);
    for group in growth::ALL.into_iter().filter(|group| measured.contains(group)) {
        table.group(group);
        for name in results.sides(table::GROWTH, group) {
            let median = |column| results.median(Key { table: table::GROWTH, group, side: name, column });
            let medians: Vec<_> = columns.iter().map(|&column| median(column)).collect();
            let growth = ratio(medians.last().copied().flatten(), medians.first().copied().flatten());
            let cells = medians.into_iter().chain([growth]).map(figure_or_dash);
            table.row(format!("  {name}"), cells);
        }
    }
    table
}
