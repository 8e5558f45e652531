//! The part `direct-io`: reading and writing through devices of losetup and of loopd, with and without direct I/O, on
//! several file systems.

mod place;
mod workload;

use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result};
use loopd_dbus::proxy::Manager;
use loopd_dbus::{AttachOptions, DetachOptions};
use loopd_tests::image::{Image, MIB};
use loopd_tests::process::run;
use loopd_tests::report::text_table::{TextTable, figure_or_dash};
use loopd_tests::sysfs::LoopDevice;

use crate::names::table;
use crate::results::{Key, Results};
use crate::scale::Scale;
use crate::scene::Scene;
use crate::side::until_free;
use crate::workspace::{Workspace, quiet};
use place::Place;

/// Of an image that is written.
const IMAGE_SIZE: u64 = 256 * MIB;

/// The columns of the table.
mod column {
    pub const DIRECT: &str = "direct";
    pub const READ: &str = "read MB/s";
    pub const CACHED: &str = "cached";
    pub const READ_LATENCY: &str = "4K read us";
    pub const WRITE: &str = "write MB/s";
    pub const WRITE_LATENCY: &str = "4K write us";
    pub const BUILD: &str = "build ms";
}

/// How an image is attached.
#[derive(Clone, Copy, Debug)]
struct How {
    name: &'static str,
    is_loopd: bool,
    /// Whether direct I/O is asked for.
    direct: bool,
}

const HOWS: [How; 4] = [
    How { name: "losetup", is_loopd: false, direct: false },
    How { name: "losetup --direct-io=on", is_loopd: false, direct: true },
    How { name: "loopd", is_loopd: true, direct: false },
    How { name: "loopd, direct-io", is_loopd: true, direct: true },
];

/// Measures all ways on all file systems in turn, round by round.
pub async fn measure(workspace: &Workspace, scale: &Scale, results: &mut Results) -> Result<()> {
    let scene = Scene::start(workspace, "direct-io").await?;
    let (_connection, manager) = scene.connect().await?;
    let places = place::all(workspace, &scene.directory, results).await?;
    for place in &places {
        workload::make_iso(&place.iso(), scale.io_bytes)?;
    }
    let mut failed = Vec::new();
    for _ in 0..scale.io_rounds {
        for place in &places {
            for how in HOWS {
                if failed.contains(&(place.name, how.name)) {
                    continue;
                }
                let session = Session { place, how, manager: &manager, bytes: scale.io_bytes };
                match session.measure(results).await {
                    Ok(()) => {}
                    // A file system may not support it.
                    Err(error) if how.direct => {
                        results.skip(format!("{} on {}", how.name, place.name), format!("{error:#}"));
                        failed.push((place.name, how.name));
                    }
                    Err(error) => return Err(error.context(format!("{} on {}", how.name, place.name))),
                }
            }
        }
    }
    Ok(())
}

/// One way on one file system, for one round.
struct Session<'a> {
    place: &'a Place,
    how: How,
    manager: &'a Manager,
    bytes: usize,
}

impl Session<'_> {
    async fn measure(&self, results: &mut Results) -> Result<()> {
        self.read(results).await?;
        self.write(results).await?;
        self.build(results).await
    }

    fn add(&self, results: &mut Results, column: &'static str, unit: &'static str, value: f64) {
        let key = Key { table: table::DIRECT_IO, group: self.place.name, side: self.how.name, column };
        results.add(key, unit, value);
    }

    /// Reads a file that is not in the page cache from its first byte to its last, and then at random.
    async fn read(&self, results: &mut Results) -> Result<()> {
        let iso = self.place.iso();
        workload::drop_from_cache(&iso)?;
        let device = self.attach(&iso, true).await?;
        self.add(results, column::DIRECT, "yes or no", f64::from(u8::from(device.flag("loop/dio")?)));
        let (time, growth) = workload::read_all(device)?;
        self.add(results, column::READ, "MB/s", self.bytes as f64 / 1e6 / time.as_secs_f64());
        self.add(results, column::CACHED, "times the file", growth / self.bytes as f64);
        for time in workload::read_at_random(device, self.bytes)? {
            self.add(results, column::READ_LATENCY, "us", time.as_secs_f64() * 1e6);
        }
        self.detach(device).await
    }

    /// Writes to an image without blocks.
    async fn write(&self, results: &mut Results) -> Result<()> {
        let image = self.place.new_image(IMAGE_SIZE)?;
        let device = self.attach(&image, false).await?;
        let bytes = self.bytes / 2;
        let seconds = workload::write_all(device, bytes)?.as_secs_f64();
        self.add(results, column::WRITE, "MB/s", bytes as f64 / 1e6 / seconds);
        for time in workload::write_at_random(device, bytes)? {
            self.add(results, column::WRITE_LATENCY, "us", time.as_secs_f64() * 1e6);
        }
        self.detach(device).await
    }

    /// Makes a file system and writes files into it, until the image is on disk.
    async fn build(&self, results: &mut Results) -> Result<()> {
        let image = self.place.new_image(IMAGE_SIZE)?;
        let device = self.attach(&image, false).await?;
        let time = workload::build(device, &image, &self.place.directory, self.bytes / 2).await?;
        self.add(results, column::BUILD, "ms", time.as_secs_f64() * 1000.0);
        self.detach(device).await
    }

    async fn attach(&self, image: &Image, read_only: bool) -> Result<LoopDevice> {
        let device = if self.how.is_loopd {
            let file = if read_only { image.open_read_only()? } else { image.open()? };
            let options = AttachOptions { direct_io: Some(self.how.direct), ..AttachOptions::default() };
            LoopDevice::from_node(&self.manager.setup_loop(file.as_fd(), &options).await?.1)?
        } else {
            let direct = if self.how.direct { &["--direct-io=on"][..] } else { &[] };
            let read_only = if read_only { &["--read-only"][..] } else { &[] };
            let arguments = [&["--find", "--show"], direct, read_only, &[image.name()]].concat();
            LoopDevice::from_node(run("losetup", arguments).await?.trim_end())?
        };
        quiet().await?;
        Ok(device)
    }

    async fn detach(&self, device: LoopDevice) -> Result<()> {
        if self.how.is_loopd {
            self.manager.detach(&device.node(), DetachOptions::default()).await?;
        } else {
            run("losetup", ["-d", &device.node()]).await?;
        }
        until_free(device).context("detach")?;
        quiet().await
    }
}

/// The table of medians.
pub fn table(results: &Results) -> TextTable {
    let columns = results.columns(table::DIRECT_IO);
    let mut headings = vec!["file system of the image"];
    headings.extend(&columns);
    let mut table = TextTable::new(&headings);
    for group in results.groups(table::DIRECT_IO) {
        table.group(group);
        for side in results.sides(table::DIRECT_IO, group) {
            let cells = columns.iter().map(|&column| {
                let median = results.median(Key { table: table::DIRECT_IO, group, side, column });
                match (column, median) {
                    (column::DIRECT, Some(direct)) => if direct > 0.0 { "yes" } else { "no" }.to_owned(),
                    _ => figure_or_dash(median),
                }
            });
            table.row(format!("  {side}"), cells);
        }
    }
    table
}
