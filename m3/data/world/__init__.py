"""The embedded world: procedural 3-D scenes, from which every modality of a sample is rendered. No files."""

from m3.data.recording import Clip, Sound
from m3.data.world.caption import caption
from m3.data.world.render import FAR, Frame, render
from m3.data.world.scene import Camera, Light, Object, Scene, sample_scene
from m3.data.world.source import Offer, WorldSource

__all__ = [
    "FAR",
    "Camera",
    "Clip",
    "Frame",
    "Light",
    "Object",
    "Offer",
    "Scene",
    "Sound",
    "WorldSource",
    "caption",
    "render",
    "sample_scene",
]
